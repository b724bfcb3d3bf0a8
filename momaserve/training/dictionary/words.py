"""Which words the dictionary explains: emoji names, then the words that names share most."""

import re
from collections import Counter
from collections.abc import Container, Sequence

from momaserve.training.dictionary.item import Item

NUM_WORDS = 1200
_NAME_WEIGHT = 3
_STOP_WORDS = frozenset({
    "and", "are", "but", "for", "from", "have", "her", "him", "his", "its", "not", "off", "our",
    "out", "over", "the", "them", "they", "this", "too", "was", "with", "you", "your", "one's",
    "cannot", "could", "does", "get", "getting", "let", "make", "non", "please", "say", "see",
    "who",
    # Parts of names that say nothing by themselves.
    "breast", "david", "fuji", "jack", "martial", "mode", "mrs", "nerd", "part", "thing", "things",
})  # fmt: skip
"""Words that are not explained: grammar, and words that say too little by themselves."""


def choose_words(
    items: Sequence[Item], known: Container[str], num_words: int = NUM_WORDS
) -> list[str]:
    """Returns `num_words` words of untoned items that `known` has, names first.

    Names that `known` has as they stand all come first, in item order; single words follow by
    how many names and keywords use them (a name counts three times), ties in alphabetic order.
    """
    plain = [item for item in items if item.tone is None and item.kind != "flag"]
    names = list(dict.fromkeys(item.name for item in plain if _is_word(item.name)))
    chosen = [name for name in names if name in known]
    scores: Counter[str] = Counter()
    for item in plain:
        for word in set(re.findall(r"[a-z]+", item.name)):
            scores[word] += _NAME_WEIGHT
        for word in {w for keyword in item.keywords for w in re.findall(r"[a-z]+", keyword)}:
            scores[word] += 1
    taken = set(chosen)
    for word in sorted(scores, key=lambda w: (-scores[w], w)):
        if word not in taken and _is_word(word) and word in known:
            chosen.append(word)
    return chosen[:num_words]


def _is_word(text: str) -> bool:
    return len(text) > 2 and text not in _STOP_WORDS and bool(re.fullmatch(r"[a-z][a-z' -]*", text))
