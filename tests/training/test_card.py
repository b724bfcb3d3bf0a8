"""The model card says what was measured, and nothing that was not."""

from __future__ import annotations

from typing import Any

from momaserve.demo import CHECKPOINT
from momaserve.models.config import ModelConfig
from momaserve.training.card import write_card
from momaserve.training.commands.eval_demo import minutes_by_stage

SCORES = {
    "num_samples": 300,
    "nearest_picture": 0.911,
    "in_nearest_5": 0.952,
    "exact_name": 0.963,
    "name_up_to_tone": 0.97,
    "round_trip": 0.905,
    "blank_pictures": 0,
}
REPORT: dict[str, Any] = {
    "samples": 300,
    "seed": 0,
    "tasks": {"causal": {"train": SCORES, "held_out": SCORES | {"num_samples": 150}}},
    "plain_words": {"causal": {"num_words": 100, "found": 0.83, "missed": {}}},
    "greedy_blank_pictures": 2,
    "reconstruction_db": {"train": 25.44, "held_out": 26.9},
    "loss": {"train": {"causal": {"text": 0.05, "image": 0.0171}}},
    "routers": {"train": {"causal": {"text": {"accuracy": 0.96, "f1": 0.92},
                                     "image": {"accuracy": 0.97, "f1": 0.93}}}},
}  # fmt: skip
FACTS = {
    "num_items": 3483,
    "num_glosses": 1200,
    "num_held_out": 150,
    "own": 502,
    "size": "72 x 72",
    "training": "`make demo`; it took an evening.",
}


def test_everything_that_was_measured_is_said() -> None:
    card = write_card(REPORT, ModelConfig.load(CHECKPOINT), FACTS)
    assert "| train | `causal` | 300 | 91.1 % | 95.2 % | 0 | 96.3 % | 97.0 % | 90.5 % |" in card
    assert "| held out | `causal` | 150 |" in card
    assert "Of 100 plain words" in card and "83.0 % find a picture" in card
    assert "Blank pictures drawn greedily: 2 of 300." in card
    assert "train 25.4 dB, held out 26.9 dB" in card
    assert "| train | `causal` | 0.0500 | 0.0171 |" in card
    assert "0.960 / 0.920 | 0.970 / 0.930" in card
    assert "3483 pictures and 1200 words" in card
    assert card.endswith("`make demo`; it took an evening.\n")


def test_minutes_of_all_runs_of_pretraining_are_said() -> None:
    first = {"image_tokenizer": {"minutes": 49.2}, "pretrain": {"minutes": 208.0}}
    second = {**first, "pretrain": {"minutes": 182.0}, "began_with": first}
    third = {**first, "pretrain": {"minutes": 125.0}, "routers": {}, "began_with": second}
    found = minutes_by_stage(third)
    assert found == {"image_tokenizer": [49.2], "pretrain": [208.0, 182.0, 125.0]}
