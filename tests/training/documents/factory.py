"""Data sets of a few words and pictures, made in a test's own folder."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from momaserve.models.image_tokenizer import ImageAutoencoder, ImageTokenizerConfig
from momaserve.training.dictionary.corpus import byte_level_bpe
from momaserve.training.documents.encode import Encoder
from momaserve.training.documents.record import Record, Skipped
from momaserve.training.documents.vocabulary import Vocabulary
from momaserve.training.image_tokenizer import save_image_tokenizer

SIDE = 8
TOKENS_PER_IMAGE = 4
TEXT_SIZE = 300
IMAGE_CONFIG = ImageTokenizerConfig(
    image_size=SIDE,
    levels=(4, 4),
    encoder_channels=(4, 4),
    decoder_channels=(4, 4),
    blocks_per_stage=1,
)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (10, 10)) -> bytes:
    return encoded(Image.new("RGB", size, colour), "PNG")


def noise(seed: int) -> bytes:
    """Four squares of random colours, a little rough."""
    rng = np.random.default_rng(seed)
    squares = rng.integers(0, 240, (2, 2, 3), dtype=np.uint8).repeat(6, axis=0).repeat(6, axis=1)
    pixels = squares + rng.integers(0, 16, (12, 12, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(path: str) -> dict[str, Any]:
    return {"type": "image", "path": path}


def message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def write_lines(path: Path, *records: Any) -> Path:
    """A JSON-lines file; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def reason_of(found: Any) -> str:
    assert isinstance(found, Skipped), found
    return found.reason


def record_of(found: Any) -> Record:
    assert isinstance(found, Record), found
    return found


@cache
def tokenizer_definition() -> str:
    definition: str = byte_level_bpe(["a red apple", "a blue boat"] * 9, TEXT_SIZE).to_str()
    return definition


def image_model() -> ImageAutoencoder:
    """Untrained, but with latents so large that different pictures have different codes."""
    torch.manual_seed(0)
    model = ImageAutoencoder(IMAGE_CONFIG).eval()
    last = model.encoder[-1]
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        last.weight.mul_(60)
        assert last.bias is not None
        last.bias.zero_()
    return model


def image_tokenizer(directory: Path) -> Path:
    save_image_tokenizer(image_model(), directory)
    return directory


def vocabulary() -> Vocabulary:
    return Vocabulary.parse(tokenizer_definition(), TEXT_SIZE, IMAGE_CONFIG)


def encoder(row_length: int = 64, *, has_images: bool = True, split_long: bool = False) -> Encoder:
    model = image_model() if has_images else None
    return Encoder(vocabulary(), model, row_length=row_length, split_long=split_long)
