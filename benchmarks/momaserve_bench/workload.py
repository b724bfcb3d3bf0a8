"""A seeded mix of requests: words and pictures, in and out, some with a prefix in common.

The same specification, seed and model give the same requests, offline and over HTTP.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from PIL import Image

from momaserve.engine import Engine
from momaserve.errors import ConfigError

WORDS = (
    *("a", "the", "red", "blue", "small", "old", "round", "bird", "tree", "house", "water"),
    *("with", "on", "and", "of", "stone", "light", "horse", "boat", "leaf", "sun", "hand"),
)
PICTURE_CELLS = 8
PICTURE_PIXELS = 64
CANCEL_SHARES = (0.25, 0.75)
"""Between which shares of its answer a request is cancelled."""


class Kind(StrEnum):
    """What a request is, by what goes in and what comes out."""

    TEXT = "text"
    IMAGE_OUTPUT = "image_output"
    IMAGE_INPUT = "image_input"
    PROBE = "probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a workload must know of a model; an engine and a server's model card both tell."""

    vocab_size: int
    max_model_len: int
    tokens_per_image: int
    """0 without pictures."""
    image_ids: range
    begin_image: int
    end_image: int
    has_pixels: bool
    """Whether it reads words and PNG files; otherwise token ids alone."""

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> ModelShape:
        """Raises ConfigError for the card of a server that is not momaserve."""
        try:
            image = card["image"]
            first, count = (image["first_token_id"], image["num_codes"]) if image else (0, 0)
            return cls(
                vocab_size=card["vocab_size"],
                max_model_len=card["max_model_len"],
                tokens_per_image=image["tokens_per_image"] if image else 0,
                image_ids=range(first, first + count),
                begin_image=image["begin_token_id"] if image else -1,
                end_image=image["end_token_id"] if image else -1,
                has_pixels=bool(image and image["size"]) and card["has_tokenizer"],
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"the server's model card lacks {error}: is it a momaserve server?"
            ) from None

    @classmethod
    def from_engine(cls, engine: Engine) -> ModelShape:
        config, processor = engine.model_config, engine.processor
        image = config.image
        return cls(
            vocab_size=config.vocab_size,
            max_model_len=engine.max_model_len,
            tokens_per_image=image.tokens_per_image if image else 0,
            image_ids=processor.spec.image_ids,
            begin_image=image.begin_token_id if image else -1,
            end_image=image.end_token_id if image else -1,
            has_pixels=processor.image is not None and processor.text is not None,
        )

    def text_ids(self) -> list[int]:
        """Ids that may stand in a prompt of words."""
        marks = {self.begin_image, self.end_image}
        return [i for i in range(self.vocab_size) if i not in self.image_ids and i not in marks]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """One request."""

    index: int
    """Where it stands in the order of arrival."""
    kind: Kind
    max_tokens: int
    """Tokens that its answer has, exactly; for a picture, those of the whole answer."""
    seed: int
    token_ids: tuple[int, ...] = ()
    """The prompt, if it is ids; empty where words say it."""
    words: str = ""
    picture: bytes = b""
    """PNG that stands before the words."""
    cancel_share: float | None = None
    """After what share of its answer the client closes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """How many requests of which kind and size.

    Raises:
        ConfigError: a count or a share out of its range, or shares that do not add up.
    """

    num_prompts: int
    input_len: int
    output_len: int
    seed: int = 0
    text_fraction: float | None = None
    """None is what the other kinds leave."""
    image_output_fraction: float = 0.0
    image_input_fraction: float = 0.0
    probe_fraction: float = 0.0
    shared_prefix_fraction: float = 0.0
    cancel_fraction: float = 0.0

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> WorkloadSpec:
        names = [name for name in cls.__slots__ if hasattr(args, name)]
        return cls(**{name: getattr(args, name) for name in names})

    def __post_init__(self) -> None:
        for name, low in (("num_prompts", 1), ("input_len", 1), ("output_len", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < low:
                raise ConfigError(f"{_flag(name)} must be at least {low}, got {value}")
        for name in self.__slots__:
            share = getattr(self, name)
            if name.endswith("_fraction") and share is not None and not 0 <= share <= 1:
                raise ConfigError(f"{_flag(name)} must be between 0 and 1, got {share}")
        others = self.image_output_fraction + self.image_input_fraction + self.probe_fraction
        if self.text_fraction is None:
            if others > 1 + 1e-9:
                raise ConfigError(
                    "the shares of requests with pictures and of probes add up to more than 1: "
                    f"{others:g}"
                )
        elif abs(self.text_fraction + others - 1) > 1e-9:
            raise ConfigError(
                "with --text-fraction the shares of all kinds must add up to 1, got "
                f"{self.text_fraction + others:g}"
            )
        if self.cancel_fraction and self.output_len < 2:
            raise ConfigError("--cancel-fraction needs an --output-len of at least 2, got 1")

    def shares(self) -> dict[Kind, float]:
        """Share of each kind; they add up to 1."""
        others = {
            Kind.IMAGE_OUTPUT: self.image_output_fraction,
            Kind.IMAGE_INPUT: self.image_input_fraction,
            Kind.PROBE: self.probe_fraction,
        }
        return {Kind.TEXT: max(0.0, 1.0 - sum(others.values())), **others}

    def make(self, shape: ModelShape) -> list[WorkItem]:
        """The requests, in their order.

        Raises:
            ConfigError: pictures that the model cannot make, or more tokens than it takes.
        """
        return _Maker(self, shape).items()


class _Maker:
    def __init__(self, spec: WorkloadSpec, shape: ModelShape) -> None:
        self._spec = spec
        self._shape = shape
        self._text_ids = shape.text_ids()
        self._check()
        rng = random.Random(f"{spec.seed} shared")
        half = spec.input_len // 2
        self._shared_ids = tuple(rng.choices(self._text_ids, k=half))
        self._shared_words = rng.choices(WORDS, k=half)
        self._shared_codes = self._codes(rng)
        self._shared_picture = _picture(rng)

    def _check(self) -> None:
        spec, shape = self._spec, self._shape
        has_pictures = spec.image_output_fraction or spec.image_input_fraction
        span = shape.tokens_per_image + 2
        if has_pictures and not shape.tokens_per_image:
            raise ConfigError("this model has no pictures: leave --image-…-fraction at 0")
        longest = spec.input_len + spec.output_len
        if spec.image_input_fraction:
            longest += span
        if spec.image_output_fraction:
            longest = max(longest, spec.input_len + span)
        if longest > shape.max_model_len:
            raise ConfigError(
                f"--input-len {spec.input_len} and --output-len {spec.output_len} make requests "
                f"of up to {longest} tokens, more than the model's {shape.max_model_len}"
            )

    def items(self) -> list[WorkItem]:
        spec = self._spec
        order = random.Random(f"{spec.seed} order")
        kinds = exact_shares(spec.shares(), spec.num_prompts)
        order.shuffle(kinds)
        is_shared = set(_chosen(order, range(spec.num_prompts), spec.shared_prefix_fraction))
        may_cancel = [i for i, kind in enumerate(kinds) if kind is not Kind.PROBE]
        cancelled = set(_chosen(order, may_cancel, spec.cancel_fraction))
        return [
            self._item(index, kind, index in is_shared, index in cancelled)
            for index, kind in enumerate(kinds)
        ]

    def _item(self, index: int, kind: Kind, is_shared: bool, is_cancelled: bool) -> WorkItem:
        spec, shape = self._spec, self._shape
        rng = random.Random(f"{spec.seed} {index}")
        max_tokens = spec.output_len
        token_ids: tuple[int, ...] = ()
        words, picture = "", b""
        if kind in (Kind.IMAGE_OUTPUT, Kind.IMAGE_INPUT) and shape.has_pixels:
            shared = self._shared_words if is_shared else []
            own = rng.choices(WORDS, k=spec.input_len - len(shared))
            words = " ".join([*shared, *own])
            if kind is Kind.IMAGE_INPUT:
                picture = self._shared_picture if is_shared else _picture(rng)
        else:
            prefix = self._shared_ids if is_shared else ()
            own_ids = rng.choices(self._text_ids, k=spec.input_len - len(prefix))
            token_ids = (*prefix, *own_ids)
            if kind is Kind.IMAGE_INPUT:
                codes = self._shared_codes if is_shared else self._codes(rng)
                token_ids = (shape.begin_image, *codes, shape.end_image, *token_ids)
            elif kind is Kind.IMAGE_OUTPUT:
                token_ids = (*token_ids, shape.begin_image)
        if kind is Kind.IMAGE_OUTPUT:
            # The end mark is part of the answer; the begin mark is where a prompt of ids ends.
            max_tokens = shape.tokens_per_image + (2 if shape.has_pixels else 1)
        elif kind is Kind.PROBE:
            max_tokens = 1
        return WorkItem(
            index=index,
            kind=kind,
            max_tokens=max_tokens,
            seed=rng.getrandbits(32),
            token_ids=token_ids,
            words=words,
            picture=picture,
            cancel_share=rng.uniform(*CANCEL_SHARES) if is_cancelled else None,
        )

    def _codes(self, rng: random.Random) -> tuple[int, ...]:
        if not self._shape.tokens_per_image:
            return ()
        return tuple(rng.choices(self._shape.image_ids, k=self._shape.tokens_per_image))


def exact_shares(shares: Mapping[Kind, float], count: int) -> list[Kind]:
    """`count` kinds in these shares, as near as whole requests come (largest remainder)."""
    wanted = {kind: share * count for kind, share in shares.items()}
    given = {kind: int(number + 1e-9) for kind, number in wanted.items()}
    by_rest = sorted(wanted, key=lambda kind: given[kind] - wanted[kind])
    for kind in by_rest[: count - sum(given.values())]:
        given[kind] += 1
    return [kind for kind, number in given.items() for _ in range(number)]


def _chosen(rng: random.Random, items: Sequence[int], share: float) -> list[int]:
    return rng.sample(items, round(share * len(items)))


def _picture(rng: random.Random) -> bytes:
    """A PNG of coloured cells."""
    cells = Image.frombytes("RGB", (PICTURE_CELLS,) * 2, rng.randbytes(3 * PICTURE_CELLS**2))
    buffer = io.BytesIO()
    cells.resize((PICTURE_PIXELS,) * 2, Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
