"""Other ways to say a CLDR name, from the name alone: "flag: japan" is the flag of japan.

Names follow few patterns, so a handful of rules turns them into what people would say. Knows no
WordNet; what is unfit or shared by too many items is sorted out by phrases.py.
"""

import re
from collections.abc import Callable

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SUBJECTS = "person|people|man|men|woman|women"
_SUBJECT_SWAPS = {"man": "guy", "men": "guys", "woman": "lady", "women": "ladies"}
_SWAPS = {
    "face": "smiley",
    "automobile": "car",
    "person": "someone",
    "symbol": "sign",
    "banknote": "bill",
}
"""Last words (or first, for persons) that people say otherwise."""
_THE = re.compile(r"^(?:united|czech|dominican|central)|(?:islands|republic|netherlands|states)$")
_FEELINGS = {
    "happy": "grinning face; grinning face with big eyes; grinning face with smiling eyes; "
    "beaming face with smiling eyes; grinning squinting face; slightly smiling face; "
    "smiling face; smiling face with smiling eyes; grinning cat; grinning cat with smiling eyes",
    "glad": "grinning face; smiling face; slightly smiling face; beaming face with smiling eyes",
    "laughing": "face with tears of joy; rolling on the floor laughing; grinning squinting face; "
    "cat with tears of joy",
    "in love": "smiling face with heart-eyes; smiling face with hearts; face blowing a kiss; "
    "smiling cat with heart-eyes",
    "sad": "slightly frowning face; frowning face; frowning face with open mouth; crying face; "
    "loudly crying face; disappointed face; pensive face; crying cat",
    "unhappy": "slightly frowning face; frowning face; disappointed face; pensive face",
    "angry": "enraged face; person pouting; pouting cat; face with symbols on mouth",
    "scared": "fearful face; face screaming in fear; anxious face with sweat; anguished face",
    "worried": "anguished face; anxious face with sweat; fearful face",
    "surprised": "face with open mouth; hushed face; astonished face; flushed face; weary cat",
    "shocked": "exploding head; face screaming in fear; face with open mouth",
    "sick": "face with thermometer; nauseated face; face vomiting; face with medical mask; "
    "sneezing face; face with head-bandage; woozy face",
    "tired": "weary face; sleepy face; sleeping face; yawning face; tired face",
    "silly": "zany face; winking face with tongue; squinting face with tongue; face with tongue",
    "bored": "unamused face; expressionless face; neutral face; face with rolling eyes",
    "shy": "flushed face; smiling face with smiling eyes; face with hand over mouth",
    "cool": "smiling face with sunglasses",
    "evil": "smiling face with horns; angry face with horns",
    "hungry": "drooling face; face savoring food",
    "proud": "face with steam from nose; smirking face",
    "dead": "face with crossed-out eyes; skull",
    "drunk": "woozy face",
    "rich": "money-mouth face",
    "smart": "nerd face; face with monocle",
    "confused": "face with raised eyebrow; thinking face; face with diagonal mouth",
}
"""Everyday words for what a face shows; CLDR names what it looks like ("grinning", "frowning")."""
FEELINGS = {
    name: [feeling for feeling, names in _FEELINGS.items() if name in names.split("; ")]
    for names in _FEELINGS.values()
    for name in names.split("; ")
}


def name_forms(name: str) -> list[str]:
    """Returns other forms of an untoned name, without repeats and without the name itself."""
    forms = [form for rule in _RULES for form in rule(name)]
    plain = name.replace("’", "'").replace("“", "").replace("”", "").replace("-", " ")
    forms += [plain, name.replace(" & ", " and "), *_feelings(name)]
    return [form for form in dict.fromkeys(forms) if form != name]


def tone_forms(base: str, phrases: list[str], tone: str) -> list[str]:
    """Returns forms of a toned name; each one says the whole tone.

    Args:
        base: the name without tones.
        phrases: what the same item without tones is called.
        tone: one tone or several joined by ", ".
    """
    names = [base, *(phrase for phrase in phrases if "," not in phrase)]
    if ", " in tone:
        return [f"{name}, {tone.replace(', ', ' and ')}" for name in names]
    simple = [name for name in names if ":" not in name]
    short = tone.removesuffix(" tone")
    forms = [f"{tone} {name}" for name in simple]
    return [*forms[:1], *(f"{name} with {short}" for name in simple[:1]), *forms[1:]]


def flag_forms(place: str) -> list[str]:
    """Returns forms of the name of a place's flag."""
    place = place.replace(" & ", " and ").replace("’", "'")
    the = "the " if _THE.search(place) else ""
    return [f"{place} flag", f"flag of {the}{place}", place]


def _flag(name: str) -> list[str]:
    return flag_forms(name.removeprefix("flag: ")) if name.startswith("flag: ") else []


def _keycap(name: str) -> list[str]:
    key = name.removeprefix("keycap: ")
    if key == name:
        return []
    if not key.isdigit():
        return [key, {"#": "hash key", "*": "asterisk key"}[key]]
    word = _NUMBERS[int(key)]
    return [key, word, f"number {word}", f"number {key}", f"{key} key"]


def _hair(name: str) -> list[str]:
    match = re.fullmatch(rf"({_SUBJECTS}): (\w+ hair|beard|bald)", name)
    if match is None:
        return []
    who, what = match.groups()
    if what == "bald":
        return [f"bald {who}", f"{who} without hair", f"{who} with no hair"]
    if what == "beard":
        return [f"bearded {who}", f"{who} with a beard", f"{who} with beard"]
    color = what.removesuffix(" hair")
    return [f"{who} with {what}", f"{color} haired {who}", f"{color}-haired {who}"] + (
        [f"blond {who}", f"blonde {who}"] if color == "blond" else []
    )


def _members(name: str) -> list[str]:
    kind, colon, rest = name.partition(": ")
    if not colon or kind not in ("kiss", "couple with heart", "family"):
        return []
    members = rest.split(", ")
    joined = " and ".join([", ".join(members[:-1]), members[-1]])
    joined = {"man and man": "two men", "woman and woman": "two women"}.get(joined, joined)
    joined = joined.replace("person and person", "two people")
    if kind == "kiss":
        return [f"{joined} kissing", f"kiss between {joined}"]
    if kind == "family":
        return [f"family of {joined}", f"family with {joined}", f"{joined} family"]
    return [f"{joined} with heart", f"{joined} in love"]


def _action(name: str) -> list[str]:
    match = re.fullmatch(rf"({_SUBJECTS}) (\w+ing)( .+)?", name)
    if match is None:
        return []
    who, action, rest = match.groups(default="")
    forms = [f"{action}{rest}"] if who in ("person", "people") else []
    forms += [f"{_SUBJECT_SWAPS[who]} {action}{rest}"] if who in _SUBJECT_SWAPS else []
    return forms if rest else [f"{action} {who}", *forms]


def _face(name: str) -> list[str]:
    match = re.fullmatch(r"(?:(.+) )?face with (.+)", name)
    if match is not None:
        _, what = match.groups()
        return [f"{what} face", what, f"face with {what}", f"smiley with {what}"]
    if name.endswith(" face") and " with " not in name:
        return [name.removesuffix(" face")]
    return []


def _with(name: str) -> list[str]:
    head, middle, tail = name.partition(" with ")
    return (
        [f"{tail} {head}", f"{head} and {tail}"]
        if middle and not {"face", ":"} & {*head.split(" "), *tail}
        else []
    )


def _blood(name: str) -> list[str]:
    match = re.fullmatch(r"(\w+) button \(blood type\)", name)
    return [] if match is None else [f"blood type {match[1]}", f"{match[1]} blood"]


def _japanese_button(name: str) -> list[str]:
    match = re.fullmatch(r"japanese “(.+)” button", name)
    return [] if match is None else [f"japanese {match[1]} sign", f"{match[1]} button"]


def _half_hour(name: str) -> list[str]:
    hour, dash, rest = name.partition("-thirty")
    return [f"half past {hour}", f"{hour} thirty"] if dash and not rest else []


def _of(name: str) -> list[str]:
    match = re.fullmatch(r"(bowl|cup|cut|drop|ear|glass|map|pot|roll|sheaf) of (.+)", name)
    return [] if match is None else [f"{match[2]} {match[1]}"]


def _swap(name: str) -> list[str]:
    words = name.split(" ")
    forms = []
    if len(words) > 1 and words[-1] in _SWAPS and "with" not in words:
        forms.append(" ".join([*words[:-1], _SWAPS[words[-1]]]))
    if len(words) > 1 and words[0] == "person":
        forms.append(" ".join([_SWAPS["person"], *words[1:]]))
    return forms


def _feelings(name: str) -> list[str]:
    feelings = [feeling for feeling in FEELINGS.get(name, []) if feeling not in name.split(" ")]
    return [f"{feeling} {name}" for feeling in feelings] + [f"{f} smiley" for f in feelings]


_RULES: tuple[Callable[[str], list[str]], ...] = (
    _flag,
    _keycap,
    _hair,
    _members,
    _action,
    _face,
    _with,
    _blood,
    _japanese_button,
    _half_hour,
    _of,
    _swap,
)
