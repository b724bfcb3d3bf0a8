"""A tiny model, tiny documents and tiny pictures to train on."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.training.dictionary.corpus import Corpus
from momaserve.training.dictionary.item import Item, split_tone
from momaserve.training.packing import Packer
from momaserve.training.pretrain import initialise
from momaserve.training.tasks import Exchange
from tests.models.factory import group, make_config

BOS, PAD, EOS, SEP = 0, 1, 2, 3
END_IMAGE, BEGIN_IMAGE = 20, 21
CODES = range(4, 20)
WORDS = range(22, 40)
NUM_CODES = 4
TWO_TWO = [group("text", ["text"], 2), group("image", ["image"], 2)]
DEPTH = {"layers": [1], "capacity": 0.5, "aux_hidden_size": 8}


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers of two text and two image experts, D 16."""
    fields: dict[str, Any] = {
        "num_hidden_layers": 2,
        "expert_groups": TWO_TWO,
        "depth_routing": None,
        "max_position_embeddings": 128,
    }
    return make_config(**fields | changes)


def tiny_model(config: ModelConfig, seed: int = 0) -> MomaModel:
    """As pretraining begins: no auxiliary routers, no thresholds."""
    model = MomaModel(config, torch.float32)
    initialise(model, seed)
    model.set_rope(config.max_position_embeddings)
    return model


def picture(word: int) -> tuple[int, ...]:
    """The picture that belongs to a word."""
    codes = (CODES[(word * step) % len(CODES)] for step in range(1, NUM_CODES + 1))
    return (BEGIN_IMAGE, *codes, END_IMAGE)


def words_only(rng: random.Random) -> Exchange:
    """A word is asked for its successors."""
    word = rng.choice(WORDS)
    answer = [WORDS[(word + step) % len(WORDS)] for step in range(rng.randint(1, 4))]
    return Exchange((word,), (*answer, EOS))


def draw(rng: random.Random) -> Exchange:
    """Word -> picture, picture -> word, or words only."""
    word = rng.choice(WORDS)
    share = rng.random()
    if share < 0.4:
        return Exchange((word,), (*picture(word), EOS))
    if share < 0.8:
        return Exchange(picture(word), (word, EOS))
    return words_only(rng)


def make_packer(config: ModelConfig) -> Packer:
    return Packer(config, SEP)


def make_item(id: int, name: str, **changes: Any) -> Item:
    fields: dict[str, Any] = {
        "emoji": "x",
        "keywords": ["fruit", "red"],
        "kind": "base",
        "tone": split_tone(name)[1],
        "base_name": split_tone(name)[0],
        "split": "train",
        "duplicate_of": None,
    }
    return Item(id=id, name=name, **fields | changes)


def make_corpus(names: list[str], pictures: np.ndarray[Any, Any], **duplicates: int) -> Corpus:
    """`duplicates` maps a name to the id of the first item with its pixels."""
    items = [
        make_item(number, name, duplicate_of=duplicates.get(name))
        for number, name in enumerate(names)
    ]
    return Corpus(items, pictures, [("apple", "a round fruit")])
