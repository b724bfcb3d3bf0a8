"""The illustrated dictionary as documents: token ids with a mark on those that are learnt.

Four tasks: name -> picture, picture -> name and keywords, word -> gloss, word -> gloss and
picture. A document is one exchange of the demo's chat template:
`<|bos|>` user `<|sep|>` answer `<|eos|>`; only the answer is learnt. A word alone always asks for
a picture. Some pictures come without any question, for classifier-free guidance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from momaserve.models.config import ModelConfig
from momaserve.training.dictionary.item import Item
from momaserve.training.dictionary.plain_words import is_kept_out
from momaserve.training.dictionary.prompts import Prompts
from momaserve.training.dictionary.wrappers import GLOSS_WRAPPERS, wrap

UNCONDITIONAL = 0.10
"""Share of the drawn pictures that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer as token ids, without bos and separator."""

    question: tuple[int, ...] | None
    """None: nothing was asked, and the document has no separator."""
    answer: tuple[int, ...]
    """Ends with eos."""


class DictionaryTasks:
    """Draws exchanges.

    `codes[i]` are variants of the image token ids of `items[i]`: the first is drawn, and any of
    them is recognised.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        items: Sequence[Item],
        codes: Sequence[Sequence[Sequence[int]]],
        glosses: Sequence[tuple[str, str]],
        encode: Callable[[str], list[int]],
        picture_share: float = 0.60,
        name_share: float = 0.27,
    ) -> None:
        """
        Args:
            picture_share, name_share: of the exchanges that draw a picture and that name one; the
                rest are glosses.
        """
        self.config = config
        self._shares = picture_share, name_share
        self.items = items
        self.codes = codes
        self.glosses = glosses
        self.encode = encode
        self.prompts = Prompts(items)
        self._index_of = {item.name: index for index, item in enumerate(items)}

    def _any_item(self, rng: random.Random) -> int:
        return rng.randrange(len(self.items))

    def draw(self, rng: random.Random) -> Exchange:
        """One exchange; a pure function of the state of `rng`."""
        share = rng.random()
        picture_share, name_share = self._shares
        if share < picture_share:
            index = self._any_item(rng)
            if rng.random() < UNCONDITIONAL:
                return Exchange(None, (*self.picture(index), self.config.eos_token_id))
            return self.name_to_picture(index, rng)
        if share < picture_share + name_share:
            return self.picture_to_name(self._any_item(rng), rng)
        return self.word_to_gloss(rng)

    def name_to_picture(self, index: int, rng: random.Random) -> Exchange:
        question = self.encode(self.prompts.draw(index, rng))
        return Exchange(tuple(question), (*self.picture(index), self.config.eos_token_id))

    def picture_to_name(self, index: int, rng: random.Random) -> Exchange:
        question = list(self.picture(index, rng.randrange(len(self.codes[index]))))
        if rng.random() < 0.5:
            question += self.encode(rng.choice(("what is this?", "name this picture")))
        answer = self.encode(describe(self.items[index]))
        return Exchange(tuple(question), (*answer, self.config.eos_token_id))

    def word_to_gloss(self, rng: random.Random) -> Exchange:
        word, gloss = self.glosses[rng.randrange(len(self.glosses))]
        answer = self.encode(gloss)
        index = self._index_of.get(word) if rng.random() < 0.3 else None
        if index is None or is_kept_out(word):
            question = wrap(rng.choice(GLOSS_WRAPPERS), word)
        else:
            question = f"tell me about {word}"
            answer += self.picture(index)
        return Exchange(tuple(self.encode(question)), (*answer, self.config.eos_token_id))

    def picture(self, index: int, variant: int = 0) -> tuple[int, ...]:
        """begin_image, codes, end_image."""
        image = self.config.image
        assert image is not None
        return (image.begin_token_id, *self.codes[index][variant], image.end_token_id)


def describe(item: Item) -> str:
    """The answer to a picture: its name, and its keywords on a line of their own."""
    return "\n".join((item.name, ", ".join(item.keywords[:6]))) if item.keywords else item.name
