"""From recipe and dictionary to what the trainers need."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from momaserve.errors import DataError
from momaserve.models.config import ModelConfig, read_json_object
from momaserve.models.image_tokenizer import ImageAutoencoder, ImageTokenizerConfig
from momaserve.training.dictionary.corpus import SPECIAL_TOKENS, Corpus, train_text_tokenizer
from momaserve.training.dictionary.item import Item
from momaserve.training.image_tokenizer import to_pixels
from momaserve.training.packing import PackedRows, Packer
from momaserve.training.pretrain import PretrainConfig
from momaserve.training.recipe import DataSettings, Recipe
from momaserve.training.run import write_atomically
from momaserve.training.tasks import DictionaryTasks, Exchange

Draw = Callable[[random.Random], Exchange]

CHAT_TEMPLATE = """\
{#- Pictures come before words, as in training; the dictionary is in lower case. -#}
{#- name to picture:  bos NAME sep PICTURE eos -#}
{#- picture to name:  bos PICTURE [what is this?] sep NAME, newline, KEYWORDS eos -#}
{#- word to gloss:    bos what is a WORD? sep GLOSS eos -#}
{#- gloss, picture:   bos tell me about WORD sep GLOSS PICTURE eos -#}
{#- unasked picture:  bos PICTURE eos (what guidance compares with) -#}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set pieces = message.content.split('<|image|>') -%}
{{- '<|image|>' * (pieces | length - 1) -}}{{- pieces | join | lower -}}{{- '<|sep|>' -}}
{%- elif message.role == 'assistant' -%}
{{- message.content -}}{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
"""


def select_items(corpus: Corpus, data: DataSettings, split: str) -> list[Item]:
    """The pictures of a recipe in one split, by id."""
    items = corpus.select(frozenset(data.kinds), split)
    if data.tones_of_held_out_persons:
        tones = frozenset({"tone"})
        persons = {item.base_name for item in corpus.select(tones, "held_out")}
        items += [item for item in corpus.select(tones, split) if item.base_name in persons]
    return sorted(items, key=lambda item: item.id)


def model_config(recipe: Recipe, image: ImageTokenizerConfig) -> ModelConfig:
    """The configuration of the language model: ids follow from the tokenizers' sizes."""
    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    first = recipe.dictionary.text_vocab_size
    return ModelConfig.from_dict(
        {
            "model_type": "moma",
            "format_version": 1,
            "vocab_size": first + image.num_codes,
            **recipe.model,
            "bos_token_id": ids["<|bos|>"],
            "pad_token_id": ids["<|pad|>"],
            "eos_token_id": ids["<|eos|>"],
            "image": {
                "first_token_id": first,
                "num_codes": image.num_codes,
                "tokens_per_image": image.grid_size**2,
                "grid": [image.grid_size, image.grid_size],
                "begin_token_id": ids["<|begin_image|>"],
                "end_token_id": ids["<|end_image|>"],
            },
        }
    )


def load_image_tokenizer(directory: Path) -> ImageAutoencoder:
    """Read a trained image tokenizer. Raises DataError when there is none."""
    try:
        config = ImageTokenizerConfig.from_dict(read_json_object(directory / "config.json"))
        model = ImageAutoencoder(config)
        model.load_state_dict(load_file(directory / "model.safetensors"))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{directory} holds no image tokenizer: {error}") from error
    return model.eval()


@torch.no_grad()
def encode_pictures(
    model: ImageAutoencoder, pictures: np.ndarray[Any, Any], first_token_id: int
) -> list[list[int]]:
    """Image token ids of pictures, uint8 [B, S, S, 3]."""
    ids: list[list[int]] = []
    for start in range(0, len(pictures), 64):
        pixels = to_pixels(torch.from_numpy(np.asarray(pictures[start : start + 64])))
        ids += (model.encode(pixels) + first_token_id).tolist()
    return ids


@torch.no_grad()
def code_variants(
    model: ImageAutoencoder, pictures: np.ndarray[Any, Any], first_token_id: int
) -> list[list[list[int]]]:
    """Several image token ids of each picture, uint8 [B, S, S, 3].

    First those of the picture, then those of what they are decoded to (a drawn picture that is
    read back), then those of the picture moved by one pixel left, right, up and down on white.
    """
    variants = [encode_pictures(model, pictures, first_token_id)]
    decoded = []
    for start in range(0, len(pictures), 64):
        codes = torch.tensor(variants[0][start : start + 64]) - first_token_id
        pixels = ((model.decode(codes) + 1) * 127.5).round().to(torch.uint8)
        decoded.append(pixels.permute(0, 2, 3, 1).numpy())
    moved = [np.concatenate(decoded)]
    for axis, step in ((2, -1), (2, 1), (1, -1), (1, 1)):
        picture = np.roll(pictures, step, axis=axis)
        edge = [slice(None)] * 4
        edge[axis] = slice(-1, None) if step < 0 else slice(0, 1)
        picture[tuple(edge)] = 255
        moved.append(picture)
    variants += [encode_pictures(model, each, first_token_id) for each in moved]
    return [list(codes) for codes in zip(*variants, strict=True)]


@dataclass(frozen=True, slots=True)
class DemoData:
    """Everything that draws training documents."""

    config: ModelConfig
    tasks: DictionaryTasks
    packer: Packer


def demo_data(
    recipe: Recipe, corpus: Corpus, image_tokenizer: Path, tokenizer: Tokenizer, split: str
) -> DemoData:
    """Documents of a recipe; `tokenizer` cuts words, `image_tokenizer` is a directory."""
    model = load_image_tokenizer(image_tokenizer)
    config = model_config(recipe, model.config)
    items = select_items(corpus, recipe.dictionary, split)
    assert config.image is not None
    pictures = corpus.pictures[[item.id for item in items]]
    tokenizer.encode_special_tokens = True  # words never become special tokens
    tasks = DictionaryTasks(
        config=config,
        items=items,
        codes=code_variants(model, pictures, config.image.first_token_id),
        glosses=corpus.glosses,
        encode=lambda text: list(tokenizer.encode(text).ids),
        picture_share=recipe.dictionary.picture_share,
        name_share=recipe.dictionary.name_share,
    )
    separator = tokenizer.token_to_id("<|sep|>")
    if separator is None:
        raise DataError("tokenizer.json has no <|sep|>: it is not this recipe's tokenizer")
    return DemoData(config, tasks, Packer(config, separator))


def rows_of_step(training: PretrainConfig, packer: Packer, draw: Draw, step: int) -> PackedRows:
    """The data of a step: a pure function of the seed and the step's number."""
    rng = random.Random(f"{training.seed}/{step}")
    if training.conversation_every and step % training.conversation_every == 0:
        length = training.num_rows * training.row_length
        return packer.conversation(lambda: draw(rng), length)
    return packer.documents(lambda: draw(rng), training.num_rows, training.row_length)


def text_tokenizer(recipe: Recipe, corpus: Corpus, path: Path) -> Tokenizer:
    """The tokenizer at `path`, trained and written there first if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        trained = train_text_tokenizer(corpus, recipe.dictionary.text_vocab_size)
        write_atomically(path, trained.to_str())
    return Tokenizer.from_file(str(path))
