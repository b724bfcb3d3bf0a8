"""Sums of documents, and what is told of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from momaserve.router_lab.losses import (
    describe_losses,
    document_losses,
    documents_of_tokens,
    kept,
    mean_loss,
)
from momaserve.router_lab.passes import prompt_tokens
from momaserve.router_lab.statistics import Bootstrap, Estimate
from momaserve.training.forward import forward_batch, token_losses
from momaserve.training.packing import PackedRows
from tests.router_lab.factory import rows_of
from tests.training.factory import picture, tiny_config, tiny_model

WORD = (0, 22, 3, 23, 24, 2)
DRAWN = (0, 25, 3, *picture(25), 2)


def conversation() -> PackedRows:
    """A row that is one document: question, answer, question, answer."""
    ids = [0, 22, 3, 23, 2, 24, 3, 25, 26, 2]
    targets = [-100, -100, 23, 2, -100, -100, 25, 26, 2, -100]
    return PackedRows(
        token_ids=torch.tensor([ids]),
        targets=torch.tensor([targets]),
        positions=torch.arange(len(ids))[None],
        documents=None,
        is_padding=torch.zeros(1, len(ids), dtype=torch.bool),
    )


def test_losses_are_summed_by_document_and_modality() -> None:
    config = tiny_config()
    model = tiny_model(config).requires_grad_(False)
    rows = rows_of(WORD, DRAWN, learnt_from=[3, 3], padding=2)
    batch = forward_batch(config, rows)
    sums = document_losses(model, rows, batch)
    losses, is_image = token_losses(model, rows, batch)
    assert sums.shape == (2, 4)
    assert sums[:, 2:].tolist() == [[3, 0], [3, 4]]  # begin, end and eos count as text
    assert sums[0, 0] == pytest.approx(float(losses[:3].sum()))
    assert sums[1, 1] == pytest.approx(float(losses[is_image].sum()))
    assert sums[:, :2].sum() == pytest.approx(float(losses.sum()))


def test_means_by_modality() -> None:
    sums = np.array([[3.0, 8.0, 2.0, 4.0], [1.0, 0.0, 2.0, 0.0]])
    total = sums.sum(0)
    assert mean_loss("text")(total) == 1.0
    assert mean_loss("image")(total) == 2.0
    assert mean_loss("all")(total) == 1.5


def test_differences_are_paired_and_perplexity_is_the_exponential() -> None:
    base = np.array([[2.0, 0.0, 2.0, 0.0], [9.0, 0.0, 3.0, 0.0]])
    worse = base + np.array([0.4, 0.0, 0.0, 0.0]) * base[:, 2:3]
    found = describe_losses({"base": base, "worse": worse}, "base", Bootstrap(100, 0))
    assert "image" not in found["worse"]  # there are no image tokens
    text = found["worse"]["text"]
    assert text["nll"]["value"] == pytest.approx(13 / 5)
    assert text["perplexity"]["value"] == pytest.approx(np.exp(13 / 5))
    for bound in ("value", "low", "high"):
        assert text["delta"][bound] == pytest.approx(0.4)
    assert text["delta_percent"] == pytest.approx(100 * 0.4 / 2.2)
    assert text["kept"] == "no"
    assert found["base"]["text"]["kept"] == "yes"
    assert found["base"]["text"]["delta"]["value"] == 0.0


@pytest.mark.parametrize(
    ("delta", "reference", "verdict"),
    [
        (Estimate(0.004, 0.001, 0.0049), 0.1, "yes"),
        (Estimate(0.004, 0.001, 0.0060), 0.1, "likely"),
        (Estimate(0.006, 0.001, 0.0080), 0.1, "no"),
        (Estimate(0.006, 0.001, 0.0099), 1.0, "yes"),  # 1 % of it
        (Estimate(-0.5, -0.9, -0.1), 1.0, "yes"),
        (Estimate(0.001), 1.0, "likely"),
        (Estimate(None), 1.0, None),
    ],
)
def test_what_counts_as_kept(delta: Estimate, reference: float, verdict: str | None) -> None:
    assert kept(delta, reference) == verdict


def test_documents_of_tokens() -> None:
    rows = rows_of(WORD, DRAWN, padding=2)
    assert documents_of_tokens(rows).tolist() == [0] * 6 + [1] * len(DRAWN) + [-1] * 2
    assert documents_of_tokens(conversation()).tolist() == [0] * 10


def test_prompts_end_where_the_last_answer_begins() -> None:
    rows = rows_of(WORD, DRAWN, learnt_from=[3, 3], padding=2)
    wanted = [True] * 3 + [False] * 3 + [True] * 3 + [False] * (len(DRAWN) - 3) + [False] * 2
    assert prompt_tokens(rows).tolist() == wanted
    assert prompt_tokens(conversation()).tolist() == [True] * 7 + [False] * 3


def test_documents_without_a_question_are_halved() -> None:
    rows = rows_of((0, 22, 23, 24, 2))
    assert prompt_tokens(rows).tolist() == [True] * 3 + [False] * 2


def test_documents_without_an_answer_are_all_prompt() -> None:
    rows = rows_of((0, 22, 23), learnt_from=[3])
    assert prompt_tokens(rows).tolist() == [True] * 3
