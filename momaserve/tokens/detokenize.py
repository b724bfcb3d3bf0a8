"""Turns the tokens of an answer into events: text, a picture growing, a picture done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from momaserve.tokens.grammar import GrammarSpec
from momaserve.tokens.incremental import incremental_text
from momaserve.tokens.stop import StopMatcher
from momaserve.tokens.text import TextTokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text tokens, and text that became certain.

    The text may lag behind its tokens by an incomplete character or by what could be the
    beginning of a stop string; then a later delta carries it.
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageProgress:
    """A picture has more image ids than before, but not yet all."""

    index: int
    """Number of the picture within the answer, from 0."""
    num_tokens: int
    """Image ids so far, those of a picture that the prompt began included."""
    total: int
    """Image ids of the whole picture."""
    _ids: Sequence[int] = field(repr=False, compare=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Image ids so far. Copied when asked for, since most progress is only counted."""
        return tuple(self._ids[: self.num_tokens])


@dataclass(frozen=True, slots=True)
class ImageDone:
    """All image ids of a picture, without begin_image and end_image."""

    index: int
    token_ids: tuple[int, ...]


Event = TextDelta | ImageProgress | ImageDone


class OutputDecoder:
    """Owns what one answer has not given out yet. Used by one thread at a time.

    Invariants:
      * the texts of all deltas up to the next picture, or to the end, join to the tokenizer's
        decode of their tokens, cut at the first stop string;
      * every text token pushed before the stop is in exactly one delta, in order; begin_image
        and end_image are in no event.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        spec: GrammarSpec,
        stop: Sequence[str] = (),
        *,
        image_prefix: Sequence[int] | None = None,
        every_code: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: None makes every text ''.
            stop: strings at which the answer ends; not empty.
            image_prefix: image ids of the picture in which the prompt ends (perhaps none yet);
                None when it ends in text.
            every_code: whether each image id makes an ImageProgress, however many come in one
                call; else the last of a picture and call does.
        """
        self._spec = spec
        self._text = incremental_text(tokenizer)
        self._stop = StopMatcher(stop)
        self._image_ids = spec.image_ids
        self._picture: list[int] | None = None if image_prefix is None else list(image_prefix)
        self._num_images = 0
        self._every_code = every_code

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. Text from it on is cut, later tokens are ignored."""
        return self._stop.stopped

    def push(self, token_ids: Sequence[int]) -> list[Event]:
        """Take the next tokens of the answer; returns what they made known, in order."""
        events: list[Event] = []
        text: list[str] = []
        text_ids: list[int] = []
        for token_id in token_ids:
            if self.stopped:
                break
            if token_id == self._spec.begin_image:
                text.append(self._flush())
                _add_text(events, text, text_ids)
                if not self.stopped:
                    self._picture = []
            elif token_id == self._spec.end_image:
                self._picture = None
            elif self._picture is not None and token_id in self._image_ids:
                self._push_code(events, self._picture, token_id)
            else:
                text_ids.append(token_id)
                text.append(self._stop.push(self._text.push(token_id)))
        _add_text(events, text, text_ids)
        return events

    def finish(self) -> list[Event]:
        """The answer is over: give out the text held back."""
        events: list[Event] = []
        _add_text(events, [self._flush()], [])
        return events

    def _flush(self) -> str:
        """Text held back so far: a picture or the end follows, so no stop string can form."""
        return self._stop.push(self._text.finish()) + self._stop.finish()

    def _push_code(self, events: list[Event], picture: list[int], token_id: int) -> None:
        picture.append(token_id)
        total = self._spec.tokens_per_image or 0
        index = self._num_images
        last = events[-1] if events else None
        if isinstance(last, ImageProgress) and last.index == index and not self._every_code:
            events.pop()
        if len(picture) < total:
            events.append(ImageProgress(index, len(picture), total, picture))
        else:
            events.append(ImageDone(index, tuple(picture)))
            self._num_images += 1
            self._picture = None


def _add_text(events: list[Event], text: list[str], token_ids: list[int]) -> None:
    """Append what was gathered, if anything, as one delta and start gathering anew."""
    joined = "".join(text)
    if joined or token_ids:
        events.append(TextDelta(joined, tuple(token_ids)))
    text.clear()
    token_ids.clear()
