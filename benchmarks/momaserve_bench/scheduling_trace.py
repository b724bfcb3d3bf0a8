"""Requests of words and of pictures, in equal numbers of tokens, and when they arrive."""

from __future__ import annotations

import random
from dataclasses import dataclass

from momaserve.tokens.grammar import GrammarSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request: a prompt of words that asks for words or for a picture."""

    name: str
    time_s: float
    prompt_ids: tuple[int, ...]
    num_text_tokens: int
    """Length of its answer; 0 asks for a picture."""

    @property
    def draws(self) -> bool:
        return self.num_text_tokens == 0


def make_trace(
    spec: GrammarSpec, *, num_requests: int, prompt_tokens: int, rate_per_s: float, seed: int
) -> list[Arrival]:
    """Half of the requests are for a picture, the others for as many words on average.

    Prompts have half to one and a half times `prompt_tokens`, and answers of words likewise.
    Both kinds come in random order. Another rate changes the times in proportion and nothing
    else.

    Args:
        rate_per_s: of a Poisson process; infinite lets all arrive at once.
    """
    dice = random.Random(seed)
    words = [i for i in range(spec.vocab_size) if is_word(spec, i)]
    draws = [index < num_requests // 2 for index in range(num_requests)]
    dice.shuffle(draws)
    assert spec.tokens_per_image is not None
    picture = spec.tokens_per_image
    trace: list[Arrival] = []
    now = 0.0
    for index, is_picture in enumerate(draws):
        now += dice.expovariate(1.0) / rate_per_s
        prompt_length, answer_length = _around(dice, prompt_tokens), _around(dice, picture)
        trace.append(
            Arrival(
                name=f"r{index}",
                time_s=now,
                prompt_ids=tuple(dice.choices(words, k=prompt_length)),
                num_text_tokens=0 if is_picture else answer_length,
            )
        )
    return trace


def is_word(spec: GrammarSpec, token_id: int) -> bool:
    """Whether an id stands for text that an answer may hold anywhere."""
    marks = (spec.bos, spec.pad, spec.eos, spec.begin_image, spec.end_image)
    return token_id not in spec.image_ids and token_id not in marks


def _around(dice: random.Random, mean: int) -> int:
    return dice.randint(max(1, mean // 2), mean + mean // 2)
