"""The illustrated dictionary as documents: token ids with a mark on those that are learnt.

Four tasks: name -> picture, picture -> name and keywords, word -> gloss, word -> gloss and
picture. A document is one exchange of the demo's chat template:
`<|bos|>` user `<|sep|>` answer `<|eos|>`; only the answer is learnt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from momaserve.models.config import ModelConfig
from momaserve.training.dictionary.item import Item, article


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer as token ids, without bos and separator."""

    question: tuple[int, ...]
    answer: tuple[int, ...]
    """Ends with eos."""


class DictionaryTasks:
    """Draws exchanges. `codes[i]` are the image token ids of `items[i]`."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        items: Sequence[Item],
        codes: Sequence[Sequence[int]],
        glosses: Sequence[tuple[str, str]],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.config = config
        self.items = items
        self.codes = codes
        self.glosses = glosses
        self.encode = encode
        self._index_of = {item.name: index for index, item in enumerate(items)}

    def draw(self, rng: random.Random) -> Exchange:
        """One exchange; a pure function of the state of `rng`."""
        share = rng.random()
        if share < 0.55:
            return self.name_to_picture(rng.randrange(len(self.items)), rng)
        if share < 0.82:
            return self.picture_to_name(rng.randrange(len(self.items)), rng)
        return self.word_to_gloss(rng)

    def name_to_picture(self, index: int, rng: random.Random) -> Exchange:
        question = self.encode(draw_prompt(self.items[index], rng))
        return Exchange(tuple(question), (*self.picture(index), self.config.eos_token_id))

    def picture_to_name(self, index: int, rng: random.Random) -> Exchange:
        question = list(self.picture(index))
        if rng.random() < 0.5:
            question += self.encode(rng.choice(("what is this?", "name this picture")))
        answer = self.encode(describe(self.items[index]))
        return Exchange(tuple(question), (*answer, self.config.eos_token_id))

    def word_to_gloss(self, rng: random.Random) -> Exchange:
        word, gloss = self.glosses[rng.randrange(len(self.glosses))]
        answer = self.encode(gloss)
        index = self._index_of.get(word) if rng.random() < 0.3 else None
        if index is None:
            question = rng.choice(
                (
                    word,
                    f"define {word}",
                    f"what is {article(word)} {word}?",
                    f"what does {word} mean?",
                )
            )
        else:
            question = f"tell me about {word}"
            answer += self.picture(index)
        return Exchange(tuple(self.encode(question)), (*answer, self.config.eos_token_id))

    def picture(self, index: int) -> tuple[int, ...]:
        """begin_image, codes, end_image."""
        image = self.config.image
        assert image is not None
        return (image.begin_token_id, *self.codes[index], image.end_token_id)


def draw_prompt(item: Item, rng: random.Random) -> str:
    """A way to ask for a picture: mostly its name, sometimes its keywords."""
    share = rng.random()
    if share < 0.40:
        return item.name
    if share < 0.60:
        return f"draw {article(item.name)} {item.name}"
    if share < 0.70:
        return f"{article(item.name)} {item.name}"
    if share < 0.80:
        return f"draw {item.name}"
    if share < 0.90 or not item.keywords:
        return f"picture of {article(item.name)} {item.name}"
    words = list(item.keywords)
    rng.shuffle(words)
    return ", ".join(words[:4])


def describe(item: Item) -> str:
    """The answer to a picture: its name, and its keywords on a line of their own."""
    return "\n".join((item.name, ", ".join(item.keywords[:6]))) if item.keywords else item.name
