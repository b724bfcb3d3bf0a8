"""The words that people put around a name when they ask for something.

Training draws prompts from these templates and the kept-out test takes the same ones off, so
that no wrapper can smuggle a kept-out word into training.
"""

import re

from momaserve.training.dictionary.item import article

DRAW_WRAPPERS = (
    "draw {a} {x}",
    "{a} {x}",
    "draw {x}",
    "picture of {a} {x}",
    "show me {a} {x}",
    "please draw {a} {x}",
    "{x} emoji",
    "an emoji of {a} {x}",
    "can you draw {a} {x}?",
)
"""{x} stands for what is wanted, {a} for its article."""

GLOSS_WRAPPERS = (
    "define {x}",
    "what is {a} {x}?",
    "what does {x} mean?",
    "meaning of {x}",
    "explain {x}",
)
"""A gloss is always asked for with one of these: a word alone means its picture."""

_ARTICLES = r"(?:(?:an?|the|some|my) )?"
_BEFORE = re.compile(
    rf"^(?:(?:please|can you|could you) )*(?:(?:draw|show)(?: me)? |(?:{_ARTICLES}"
    rf"(?:picture|image|drawing|emoji|icon) of )|an? |the |some |my |please )"
)
_AFTER = re.compile(r" (?:emoji|icon|picture|image|drawing|please)$")


def wrap(template: str, text: str) -> str:
    """Puts `text` and its article into a template."""
    return template.format(a=article(text), x=text)


def unwrap(prompt: str) -> str:
    """Takes wrappers, articles and surrounding punctuation off, in lower case."""
    text = " ".join(prompt.lower().split())
    while True:
        inner = _AFTER.sub("", _BEFORE.sub("", text.strip(" \t.,;:!?\"'“”‘’()")))
        if inner == text:
            return text
        text = inner
