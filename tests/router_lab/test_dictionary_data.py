"""The report on a tiny illustrated dictionary: tasks are scored, held-out pictures apart."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from momaserve.errors import ConfigError, DataError
from momaserve.router_lab.source import open_source
from momaserve.training.demo import encode_pictures
from momaserve.training.dictionary.item import Item
from momaserve.training.recipe import Recipe
from momaserve_server.cli import main
from tests.training.factory import make_item

RECIPE = """
[data]
kinds = ["base"]
text_vocab_size = 300

[image_tokenizer]
num_steps = 3
batch_size = 4

[image_tokenizer.model]
image_size = 8
levels = [4, 4]
encoder_channels = [4, 4]
decoder_channels = [4, 4]
blocks_per_stage = 1

[model]
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 8
norm_order = "post"
rms_norm_eps = 1e-5
qk_norm = true
rope_theta = 10000.0
max_position_embeddings = 256
tie_word_embeddings = false

[[model.expert_groups]]
name = "text"
modalities = ["text"]
num_experts = 2
intermediate_size = 8

[[model.expert_groups]]
name = "image"
modalities = ["image"]
num_experts = 2
intermediate_size = 8

[pretrain]
num_steps = 4
num_rows = 2
row_length = 96
conversation_every = 2

[routers]
num_steps = 3
"""


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "dictionary"
        self.data.mkdir()
        names = [f"thing {word}" for word in ("one", "two", "three", "four", "five", "six")]
        items = [
            make_item(i, name, split="held_out" if i >= 4 else "train", phrases=[f"a {name}"])
            for i, name in enumerate(names)
        ]
        self.write_items(items)
        pixels = np.random.default_rng(0).integers(0, 256, (len(items), 8, 8, 3), dtype=np.uint8)
        np.save(self.data / "glyphs.npy", pixels)
        glosses = [{"word": f"word {i}", "gloss": f"what {i} means"} for i in range(8)]
        lines = "".join(json.dumps(gloss) + "\n" for gloss in glosses)
        (self.data / "glosses.jsonl").write_text(lines)
        self.recipe = folder / "r.toml"
        self.recipe.write_text(RECIPE)
        self.checkpoint = folder / "mine"
        source = ("--recipe", self.recipe, "--data", self.data)
        self.run("train-image-tokenizer", *source, "--out", folder / "codes")
        self.run("train", *source, "--image-tokenizer", folder / "codes", "--out", self.checkpoint)
        self.run("fit-routers", self.checkpoint, *source)

    def write_items(self, items: list[Item]) -> None:
        lines = "".join(json.dumps(asdict(item)) + "\n" for item in items)
        (self.data / "items.jsonl").write_text(lines)

    def run(self, *words: object) -> None:
        assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("dictionary"))


@pytest.fixture(scope="module")
def report(place: Place) -> dict[str, Any]:
    out = place.folder / "report"
    words = ("--quick", "--batches", 2, "--bootstrap", 20, "--samples", 3, "--threads", 1)
    source = ("--recipe", place.recipe, "--data", place.data, "--out", out)
    place.run(
        "router-report", place.checkpoint, *source, *words, "--parts", "policies", "generation"
    )
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_train_and_held_out_are_told_apart(report: dict[str, Any]) -> None:
    assert report["data"]["summary"] == "4 train, 2 held_out pictures of the dictionary"
    splits = report["parts"]["policies"]["splits"]
    assert list(splits) == ["train", "held_out"]
    nll = [split["loss"]["causal"]["image"]["nll"]["value"] for split in splits.values()]
    assert nll[0] != nll[1]


def test_tasks_are_scored_under_every_policy_that_serves(report: dict[str, Any]) -> None:
    generation = report["parts"]["generation"]
    assert generation["samples"] == {"train": 3, "held_out": 2}
    for tasks in generation["splits"].values():
        assert list(tasks) == ["name to picture", "picture to name", "round trip"]
        for task in tasks.values():
            assert list(task["policies"]) == ["causal", "calibrated", "expert_choice_prompt"]
            best = task["policies"][task["best"]]
            assert best["p"] == 1.0
            assert not best["is_worse"]
            assert all(row["score"] <= best["score"] for row in task["policies"].values())


def test_scored_rows_are_no_training_rows_and_seeds_differ(place: Place) -> None:
    def opened(seed: int) -> Any:
        return open_source(
            str(place.data),
            str(place.recipe),
            place.checkpoint,
            place.folder / "x",
            num_batches=3,
            seed=seed,
        )

    data = opened(0)
    assert data.fingerprint() == opened(0).fingerprint() != opened(1).fingerprint()
    assert data.splits["train"][0].documents is None  # a conversation, as in training
    assert data.short_rows(0).documents is not None
    codes = {
        tuple(row)
        for rows in (*data.splits["train"], *(data.fresh_rows(step) for step in range(3)))
        for row in rows.token_ids.tolist()
    }
    assert len(codes) == 2 * (1 + 2 + 1)  # rows of a conversation and of documents, none twice


def test_pixels_of_pictures_are_the_dictionary_s_own(place: Place) -> None:
    data = open_source(
        str(place.data),
        str(place.recipe),
        place.checkpoint,
        place.folder / "x",
        num_batches=1,
        seed=0,
    )
    assert data.dictionary is not None
    assert data.pictures is not None
    assert data.config.image is not None
    _, corpus = data.dictionary
    (codes,) = encode_pictures(
        data.pictures, np.array(corpus.pictures[1:2]), data.config.image.first_token_id
    )
    found = data.find_pictures({tuple(codes), (1, 2, 3, 4)})
    assert list(found) == [tuple(codes)]
    same = [np.array_equal(found[tuple(codes)], picture) for picture in corpus.pictures]
    assert any(same)


def test_a_recipe_of_other_tokens_is_refused(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(RECIPE.replace("text_vocab_size = 300", "text_vocab_size = 301"))
    Recipe.load(str(other))
    with pytest.raises(ConfigError, match="the recipe gives other vocab_size, image than"):
        open_source(str(place.data), str(other), place.checkpoint, tmp_path, num_batches=1, seed=0)


def test_a_checkpoint_without_words_knows_no_dictionary(place: Place, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((place.checkpoint / "config.json").read_bytes())
    with pytest.raises(DataError, match="it knows no dictionary"):
        open_source(str(place.data), str(place.recipe), bare, tmp_path, num_batches=1, seed=0)
