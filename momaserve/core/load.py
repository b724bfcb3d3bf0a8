"""What a step computes, as far as its time depends on it. Knows no block and no second."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from momaserve.modality import Modality
from momaserve.request import TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """The work of one step; expected experts and pairs follow from its tokens."""

    text_tokens: float = 0
    image_tokens: float = 0
    kv_tokens: float = 0
    """Tokens whose K/V are read in each layer: what is visible, once for each sequence."""
    visible_pairs: float = 0
    """Pairs of a new token and a token that it attends to, itself included."""
    sampled_rows: float = 0
    """Rows of the head."""
    code_rows: float = 0
    """Those of them that choose among image codes alone."""

    def tokens_of(self, modality: Modality) -> float:
        return self.text_tokens if modality is Modality.TEXT else self.image_tokens

    def plus(self, other: StepLoad) -> StepLoad:
        """Both in one step."""
        return StepLoad(
            text_tokens=self.text_tokens + other.text_tokens,
            image_tokens=self.image_tokens + other.image_tokens,
            kv_tokens=self.kv_tokens + other.kv_tokens,
            visible_pairs=self.visible_pairs + other.visible_pairs,
            sampled_rows=self.sampled_rows + other.sampled_rows,
            code_rows=self.code_rows + other.code_rows,
        )


class LoadMeter:
    """Tells the modality of tokens by their ids, and adds up what sequences bring to a step."""

    def __init__(self, image_ids: range, begin_image: int | None) -> None:
        self._image_ids = image_ids
        self._begin_image = begin_image

    def phase(self, sequence: TokenSequence) -> Modality:
        """Modality of the token that comes next: the state of the grammar, read off the last id.

        A picture is open after `begin_image` and after each of its codes but the last, which
        `end_image` follows at once.
        """
        last = sequence.token_ids[-1]
        is_open = last in self._image_ids or last == self._begin_image
        return Modality.IMAGE if is_open else Modality.TEXT

    def count_images(self, sequence: TokenSequence, start: int, count: int) -> int:
        """Image tokens among `count` tokens from `start` on; one may still be unknown."""
        ids, image_ids = sequence.token_ids, self._image_ids
        known = ids[start : start + count]
        num_images = sum(1 for token in known if token in image_ids) if image_ids else 0
        if len(known) < count and self.phase(sequence) is Modality.IMAGE:
            num_images += count - len(known)
        return num_images

    def measure(
        self,
        parts: Iterable[tuple[TokenSequence, int, int]],
        num_rows: int,
        num_code_rows: int = 0,
    ) -> StepLoad:
        """The load of a step.

        Args:
            parts: (sequence, first token, number of tokens) of each of its rows.
            num_rows: rows that are sampled from or scored.
            num_code_rows: those of them that choose among image codes alone.
        """
        num_tokens = num_images = kv_tokens = 0
        pairs = 0.0
        image_ids = self._image_ids
        for sequence, start, count in parts:
            num_tokens += count
            kv_tokens += start + count
            if count == 1 and start < len(sequence.token_ids):  # nearly all of most steps
                num_images += sequence.token_ids[start] in image_ids
                pairs += start + 1
            else:
                num_images += self.count_images(sequence, start, count)
                pairs += visible_pairs(start, count)
        return StepLoad(
            text_tokens=num_tokens - num_images,
            image_tokens=num_images,
            kv_tokens=kv_tokens,
            visible_pairs=pairs,
            sampled_rows=num_rows,
            code_rows=num_code_rows,
        )


def visible_pairs(start: float, count: float) -> float:
    """Pairs of each of `count` tokens behind `start` others, and what it attends to."""
    return count * start + count * (count + 1) / 2
