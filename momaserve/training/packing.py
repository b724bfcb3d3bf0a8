"""Packs exchanges into rows of equal length for pretraining.

Two kinds of batches alternate: short rows of independent documents, each blind to the others
(document masking, positions from 0), and one long row, a conversation of many exchanges whose
positions cover the whole context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from momaserve.kernels import reference
from momaserve.models.config import ModelConfig
from momaserve.training.tasks import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """R rows of S tokens."""

    token_ids: Tensor
    """int64 [R, S]; padding is pad_token_id."""
    targets: Tensor
    """int64 [R, S], the next token where it is learnt, else -100."""
    positions: Tensor
    """int64 [R, S]."""
    documents: Tensor | None
    """int64 [R, S], number of the document of each token; None: a row is one document."""
    is_padding: Tensor
    """bool [R, S]."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    def num_visible(self) -> Tensor:
        """int64 [R, S]: tokens that each token attends to, itself included.

        Documents lie in one piece each; padding counts as a document of its own.
        """
        index = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        if self.documents is None:
            return (index + 1).expand_as(self.token_ids)
        is_first = torch.ones_like(self.documents, dtype=torch.bool)
        is_first[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return index - torch.where(is_first, index, 0).cummax(dim=1).values + 1

    def to(self, device: torch.device) -> PackedRows:
        """The same rows with all tensors on a device."""
        if self.token_ids.device == device:
            return self
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in tensors.items()}
        return PackedRows(**moved)


RowsOfStep = Callable[[int], PackedRows]
"""The data of a step, a pure function of its number."""


class PackedAttention:
    """Attention within documents over packed rows; nothing is cached.

    `taken` of depth-routed layers hides skipped tokens from the keys.
    """

    def __init__(self, rows: PackedRows) -> None:
        self._shape = tuple(rows.token_ids.shape)
        self._mask: Tensor | None = None
        if rows.documents is not None:
            size = self._shape[1]
            causal = torch.ones(size, size, dtype=torch.bool).tril()
            same = rows.documents.unsqueeze(2) == rows.documents.unsqueeze(1)
            self._mask = (same & causal.to(same.device)).unsqueeze(1)  # [R, 1, S, S]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None) -> Tensor:
        """[T, H, K] x 3 with T = R * S -> [T, H, K]."""
        rows, size = self._shape
        mask = self._mask
        if taken is not None:
            if mask is None:
                mask = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()[None, None]
            itself = torch.eye(size, dtype=torch.bool, device=q.device)
            mask = (mask & taken.view(rows, 1, 1, size)) | itself
        parts = [x.view(rows, size, *x.shape[1:]) for x in (q, k, v)]
        out = reference.attend(parts[0], parts[1], parts[2], mask, is_causal=mask is None)
        return out.flatten(0, 1)


class Packer:
    """Fills rows from a stream of exchanges."""

    def __init__(self, config: ModelConfig, separator_id: int) -> None:
        self.config = config
        self.separator_id = separator_id

    def _append(
        self, tokens: list[int], learnt: list[bool], exchange: Exchange, *, with_bos: bool
    ) -> None:
        question = [] if exchange.question is None else [*exchange.question, self.separator_id]
        if with_bos:
            question = [self.config.bos_token_id, *question]
        tokens += [*question, *exchange.answer]
        learnt += [False] * len(question) + [True] * len(exchange.answer)

    def documents(self, draw: Callable[[], Exchange], num_rows: int, length: int) -> PackedRows:
        """`num_rows` rows of `length` tokens holding whole documents and some padding."""
        shape = (num_rows, length)
        token_ids = np.full(shape, self.config.pad_token_id)
        learnt = np.zeros(shape, dtype=bool)
        positions = np.zeros(shape, dtype=np.int64)
        documents = np.full(shape, -1)
        fills = [0] * num_rows
        misses = 0
        number = 0
        while misses < 3:
            tokens: list[int] = []
            marks: list[bool] = []
            self._append(tokens, marks, draw(), with_bos=True)
            tokens, marks = tokens[:length], marks[:length]
            row = next((r for r in range(num_rows) if fills[r] + len(tokens) <= length), None)
            if row is None:
                misses += 1
                continue
            span = slice(fills[row], fills[row] + len(tokens))
            token_ids[row, span] = tokens
            learnt[row, span] = marks
            positions[row, span] = np.arange(len(tokens))
            documents[row, span] = number
            fills[row] += len(tokens)
            number += 1
        return self._rows(token_ids, learnt, positions, documents)

    def conversation(self, draw: Callable[[], Exchange], length: int) -> PackedRows:
        """One row: exchanges after one another, each seeing all before it.

        Exchanges without a question are left out: after others they would not be unconditional.
        """
        tokens: list[int] = []
        marks: list[bool] = []
        while len(tokens) < length:
            exchange = draw()
            if exchange.question is not None:
                self._append(tokens, marks, exchange, with_bos=not tokens)
        token_ids = np.array([tokens[:length]])
        learnt = np.array([marks[:length]])
        return self._rows(token_ids, learnt, np.arange(length)[None], None)

    def _rows(
        self,
        token_ids: np.ndarray[Any, Any],
        learnt: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        documents: np.ndarray[Any, Any] | None,
    ) -> PackedRows:
        targets = np.full_like(token_ids, -100)
        targets[:, :-1] = np.where(learnt[:, 1:], token_ids[:, 1:], -100)
        # Not by the id: pad and eos are one in many a vocabulary.
        padding = np.zeros(token_ids.shape, dtype=bool) if documents is None else documents < 0
        return PackedRows(
            token_ids=torch.from_numpy(token_ids),
            targets=torch.from_numpy(targets),
            positions=torch.from_numpy(positions),
            documents=None if documents is None else torch.from_numpy(documents),
            is_padding=torch.from_numpy(padding),
        )
