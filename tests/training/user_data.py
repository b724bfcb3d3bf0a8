"""A user's data set and recipe, small enough to go through every command."""

from __future__ import annotations

from pathlib import Path

from tests.training.documents import factory

COLOURS = ("red", "blue", "green", "white")
TEXT_ONLY = """
[data]
source = "documents"
text_vocab_size = 300
validation_share = 0.2

[pretrain]
num_steps = 6
num_rows = 2
row_length = 48
log_every = 2
save_every = 2
validate_every = 4

[routers]
num_steps = 3

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
max_position_embeddings = 64
tie_word_embeddings = false

[[model.expert_groups]]
name = "text"
modalities = ["text"]
num_experts = {experts}
intermediate_size = 8
"""
PICTURES = """
[[model.expert_groups]]
name = "image"
modalities = ["image"]
num_experts = {experts}
intermediate_size = 8

[image_tokenizer]
num_steps = 3
batch_size = 4

[image_tokenizer.model]
image_size = 8
levels = [4, 4]
encoder_channels = [4, 4]
decoder_channels = [4, 4]
blocks_per_stage = 1
"""


def write_texts(folder: Path, count: int = 30) -> Path:
    lines = [
        {"text": f"{COLOURS[i % 4]} apple {i}, {COLOURS[i // 4 % 4]} boat"} for i in range(count)
    ]
    return factory.write_lines(folder / "texts.jsonl", *lines)


def write_captions(folder: Path, count: int = 20) -> Path:
    """A folder of pictures, each with its words beside it."""
    for i in range(count):
        factory.write(folder / f"{i:02}.png", factory.noise(i))
        factory.write(folder / f"{i:02}.txt", f"{COLOURS[i % 4]} thing {i}")
    return folder


def write_recipe(path: Path, *, experts: int = 2, has_pictures: bool = False) -> Path:
    text = TEXT_ONLY.replace("{experts}", str(experts))
    if has_pictures:
        text += PICTURES.replace("{experts}", str(experts))
    path.write_text(text, encoding="utf-8")
    return path
