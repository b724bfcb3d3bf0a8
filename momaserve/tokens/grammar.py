"""Which token ids may follow which (model.md, 6): text, pictures of exactly N codes, the end.

Knows ids only: no tensor, no tokenizer, no pixel. Every call does constant work per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from momaserve.errors import CheckpointError, PromptError, SamplingError
from momaserve.sampling import OutputMode

if TYPE_CHECKING:
    from momaserve.models.config import ModelConfig


class Choices(StrEnum):
    """Which ids the next sample may be."""

    TEXT = "text"
    """Text ids except bos, pad, begin_image and end_image; and eos."""
    TEXT_OR_IMAGE = "text_or_image"
    """The same and begin_image."""
    IMAGE = "image"
    """Image ids and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarSpec:
    """The ids that matter to the grammar. The image fields are all None, or none of them is.

    Raises:
        CheckpointError: ids that are out of range or get in each other's way.
    """

    vocab_size: int
    bos: int
    pad: int
    eos: int
    image_first: int | None = None
    image_num_codes: int | None = None
    tokens_per_image: int | None = None
    begin_image: int | None = None
    end_image: int | None = None

    def __post_init__(self) -> None:
        image = (
            self.image_first,
            self.image_num_codes,
            self.tokens_per_image,
            self.begin_image,
            self.end_image,
        )
        if any(value is None for value in image) and any(value is not None for value in image):
            raise CheckpointError("the image ids of a vocabulary must be given all or not at all")
        names = ("bos", "pad", "eos", "begin_image", "end_image")
        controls = {n: v for n in names if (v := getattr(self, n)) is not None}
        for name, value in controls.items():
            if not 0 <= value < self.vocab_size:
                raise CheckpointError(
                    f"{name} id {value} is not below vocab_size {self.vocab_size}"
                )
            if value in self.image_ids:
                raise CheckpointError(f"{name} id {value} lies among the image ids")
        for name in ("begin_image", "end_image"):
            value = controls.pop(name, None)
            if value is not None and value in controls.values():
                raise CheckpointError(f"{name} id {value} has another meaning as well")
        if self.image_ids and (self.image_ids[0] < 0 or self.image_ids[-1] >= self.vocab_size):
            raise CheckpointError(
                f"image ids {self.image_ids[0]}..{self.image_ids[-1]} do not fit into "
                f"vocab_size {self.vocab_size}"
            )
        if self.tokens_per_image is not None and (self.tokens_per_image < 1 or not self.image_ids):
            raise CheckpointError("a picture needs at least one token and one code")

    @classmethod
    def from_config(cls, config: ModelConfig) -> GrammarSpec:
        image = config.image
        return cls(
            vocab_size=config.vocab_size,
            bos=config.bos_token_id,
            pad=config.pad_token_id,
            eos=config.eos_token_id,
            image_first=None if image is None else image.first_token_id,
            image_num_codes=None if image is None else image.num_codes,
            tokens_per_image=None if image is None else image.tokens_per_image,
            begin_image=None if image is None else image.begin_token_id,
            end_image=None if image is None else image.end_token_id,
        )

    @property
    def has_images(self) -> bool:
        return self.image_first is not None

    @property
    def image_ids(self) -> range:
        """The ids of image codes; empty for a model without pictures."""
        if self.image_first is None or self.image_num_codes is None:
            return range(0)
        return range(self.image_first, self.image_first + self.image_num_codes)

    @property
    def num_image_span_tokens(self) -> int:
        """Tokens of a whole picture: begin_image, the codes, end_image. 0 without pictures."""
        return 0 if self.tokens_per_image is None else self.tokens_per_image + 2

    @property
    def unsampled_text_ids(self) -> frozenset[int]:
        """Text ids that are never sampled as text (eos may be, whatever else it is)."""
        controls = {self.bos, self.pad, self.begin_image, self.end_image} - {self.eos, None}
        return frozenset(i for i in controls if i is not None)

    def allows(self, choices: Choices, token_id: int) -> bool:
        """Whether `choices` holds `token_id`: the definition that the sampler's masks follow."""
        if not 0 <= token_id < self.vocab_size:
            return False
        if choices is Choices.IMAGE:
            return token_id in self.image_ids
        if token_id == self.begin_image:
            return choices is Choices.TEXT_OR_IMAGE
        return token_id not in self.image_ids and token_id not in self.unsampled_text_ids


@dataclass(frozen=True, slots=True)
class GrammarState:
    """Where a sequence stands between two tokens."""

    image_tokens: int | None = None
    """Codes since begin_image while inside a picture; None in text."""


TEXT_STATE = GrammarState()


class Advance(NamedTuple):
    """What one token changed."""

    state: GrammarState
    """The state after the token and the forced ones."""
    forced: tuple[int, ...]
    """Ids that must follow at once; the engine appends them without sampling."""
    finished: bool
    """Whether the grammar ends the answer here (eos, or the picture of mode `image` is done).
    A request that ignores eos disregards it after eos."""


class Grammar:
    """The rules of one vocabulary. Immutable; states are kept by the caller.

    Invariants, for a request that passed `check_room` and samples from `choices`:
      * every begin_image is followed by exactly N image ids and end_image, whatever the budget;
      * no image id, begin_image or end_image occurs anywhere else.
    """

    def __init__(self, spec: GrammarSpec) -> None:
        self.spec = spec
        self._image_ids = spec.image_ids
        self._num_codes = spec.tokens_per_image or 0
        self._image_states = tuple(GrammarState(i) for i in range(self._num_codes))
        self._unsampled = spec.unsampled_text_ids

    def scan(self, prompt_ids: Sequence[int]) -> GrammarState:
        """State after a prompt.

        Raises:
            PromptError: an empty prompt, an id out of range, or a malformed image span; the
                message names the position and the id.
        """
        if not prompt_ids:
            raise PromptError("the prompt has no tokens", param="prompt")
        spec, image_ids, num_codes = self.spec, self._image_ids, self._num_codes
        codes: int | None = None  # since begin_image; None in text
        for position, token_id in enumerate(prompt_ids):
            # bool is an int to Python, but `true` in a request is a mistake.
            if type(token_id) is not int or not 0 <= token_id < spec.vocab_size:
                raise PromptError(
                    f"prompt token at position {position} must be an integer from 0 to "
                    f"{spec.vocab_size - 1}, got {_short(token_id)}",
                    param="prompt",
                )
            if codes is None:
                if token_id == spec.begin_image:
                    codes = 0
                elif token_id in image_ids or token_id == spec.end_image:
                    what = "image id" if token_id in image_ids else "end_image"
                    raise PromptError(
                        f"prompt position {position}: {what} {token_id} outside a picture",
                        param="prompt",
                    )
            elif codes < num_codes:
                if token_id not in image_ids:
                    raise PromptError(
                        f"prompt position {position}: id {token_id} inside a picture that has "
                        f"{codes} of its {num_codes} image ids",
                        param="prompt",
                    )
                codes += 1
            elif token_id == spec.end_image:
                codes = None
            else:
                raise PromptError(
                    f"prompt position {position}: a picture of {num_codes} image ids must be "
                    f"followed by end_image ({spec.end_image}), got {token_id}",
                    param="prompt",
                )
        if codes is None:
            return TEXT_STATE
        if codes == num_codes:
            raise PromptError(
                f"the prompt ends after the {num_codes} image ids of a picture: add end_image "
                f"({spec.end_image})",
                param="prompt",
            )
        return self._image_states[codes]

    def check_room(self, state: GrammarState, mode: OutputMode, max_tokens: int) -> None:
        """Check that the pictures which an answer must have can be finished.

        Args:
            max_tokens: tokens the answer may have at most, the context's limit included.

        Raises:
            SamplingError: there is no room, or the checkpoint makes no pictures.
        """
        if mode is not OutputMode.TEXT and not self.spec.has_images:
            raise SamplingError("this checkpoint makes no pictures", param="modalities")
        if max_tokens == 0 and mode is not OutputMode.IMAGE:
            return  # nothing is generated, so nothing can be cut
        if state.image_tokens is not None:
            needed, what = self.num_tokens_to_close(state), "the rest of the prompt's picture"
        elif mode is OutputMode.IMAGE:
            needed, what = self.spec.num_image_span_tokens, "a picture"
        else:
            return
        if max_tokens < needed:
            raise SamplingError(
                f"{what} takes {needed} tokens, but max_tokens and the context leave {max_tokens}",
                param="max_tokens",
            )

    def num_tokens_to_close(self, state: GrammarState) -> int:
        """Tokens until the open picture has ended, end_image included; 0 in text."""
        if state.image_tokens is None:
            return 0
        return self._num_codes - state.image_tokens + 1

    def opening(self, state: GrammarState, mode: OutputMode) -> tuple[int, ...]:
        """Ids that the answer must start with; pass each of them to `advance`."""
        if mode is not OutputMode.IMAGE or state.image_tokens is not None:
            return ()
        if self.spec.begin_image is None:
            raise SamplingError("this checkpoint makes no pictures", param="modalities")
        return (self.spec.begin_image,)

    def choices(self, state: GrammarState, mode: OutputMode, budget: int) -> Choices:
        """What the next sample may be.

        Args:
            budget: tokens that the answer may still have, this one included; the smaller of
                what max_tokens and the context leave.
        """
        if state.image_tokens is not None:
            return Choices.IMAGE
        if mode is OutputMode.IMAGE:
            raise ValueError("an answer in mode image is over, or lacks its opening")
        if (
            mode is OutputMode.INTERLEAVED
            and self._num_codes
            and budget >= self.spec.num_image_span_tokens
        ):
            return Choices.TEXT_OR_IMAGE
        return Choices.TEXT

    def advance(self, state: GrammarState, token_id: int, mode: OutputMode) -> Advance:
        """Take a sampled token, or one of `opening`.

        Raises:
            ValueError: a token that `choices` does not hold: the sampler's mask is wrong.
        """
        spec, codes = self.spec, state.image_tokens
        if codes is None:
            if token_id == spec.begin_image and mode is not OutputMode.TEXT:
                return Advance(self._image_states[0], (), False)
            if (
                token_id in self._image_ids
                or token_id in self._unsampled
                or not 0 <= token_id < spec.vocab_size
                or mode is OutputMode.IMAGE
            ):
                raise ValueError(f"token id {token_id} cannot follow in text in mode {mode}")
            return Advance(TEXT_STATE, (), token_id == spec.eos)
        if token_id not in self._image_ids or spec.end_image is None:
            raise ValueError(f"token id {token_id} cannot follow inside a picture")
        if codes + 1 < self._num_codes:
            return Advance(self._image_states[codes + 1], (), False)
        return Advance(TEXT_STATE, (spec.end_image,), mode is OutputMode.IMAGE)


def _short(value: object) -> str:
    """A bounded description of a value that a client sent."""
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value).__name__
    return str(value) if abs(value) < 10**20 else "an integer of more than 20 digits"
