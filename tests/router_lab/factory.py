"""Rows of given tokens, and recorded routers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from momaserve.layers.routing import Router
from momaserve.router_lab.policies import Site
from momaserve.router_lab.selections import Seen
from momaserve.tokens.text import TextTokenizer
from momaserve.training.packing import PackedRows

PAD = 1


def rows_of(
    *documents: Sequence[int], learnt_from: Sequence[int] | None = None, padding: int = 0
) -> PackedRows:
    """One row of whole documents and some padding; each is learnt from a place on (default 1)."""
    starts = learnt_from or [1] * len(documents)
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    for number, (document, start) in enumerate(zip(documents, starts, strict=True)):
        ids += document
        following = [*document[1:], -100]
        targets += [t if place + 1 >= start else -100 for place, t in enumerate(following)]
        positions += range(len(document))
        owners += [number] * len(document)
    ids += [PAD] * padding
    targets += [-100] * padding
    positions += [0] * padding
    owners += [-1] * padding
    return PackedRows(
        token_ids=torch.tensor([ids]),
        targets=torch.tensor([targets]),
        positions=torch.tensor([positions]),
        documents=torch.tensor([owners]),
        is_padding=torch.tensor([owners]) < 0,
    )


def table(*rows: str) -> Tensor:
    """bool [T, E] from lines such as "x.x."."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def seen(selected: Tensor, logits: Tensor | None = None, aux: Tensor | None = None) -> Seen:
    """All tokens eligible."""
    if logits is None:
        logits = torch.zeros(selected.shape)
    return Seen(logits, torch.ones(len(selected), dtype=torch.bool), selected, aux)


def site(
    logits: Tensor, *, name: str = "0.text", seed: str = "s", real: Tensor | None = None
) -> Site:
    """A router that scores T tokens so; it reads logits as hidden states."""
    router = Router(logits.shape[1], 2, logits.shape[1], 0.5 if name.endswith("depth") else None)
    if real is None:
        real = torch.ones(len(logits), dtype=torch.bool)
    return Site(name, router, logits, logits, real, seed)


class NumberWords:
    """A text tokenizer whose words are the ids themselves; ids below 4 have no text."""

    @classmethod
    def tokenizer(cls) -> TextTokenizer:
        return cast(TextTokenizer, cls())

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in token_ids if token >= 4)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split() if word.isdigit() and 22 <= int(word) < 40]
