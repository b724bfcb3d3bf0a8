"""What the dictionary does not say: WordNet records language as it is used, slurs included."""

import re

EXCLUDED_WORDS = frozenset({
    "ass", "arse", "bastard", "bitch", "bum", "butt", "balls", "cock", "coon", "crap", "cum",
    "damn", "dick", "dyke", "fag", "fanny", "gay", "gook", "gypsy", "hell", "homo", "hooker",
    "idiot", "jerk", "knob", "lesbian", "moron", "nude", "naked", "oriental", "piss", "poo", "poop",
    "prick", "pussy", "queer", "retard", "savage", "screw", "sex", "sexy", "shit", "slut", "spade",
    "squaw", "tit", "turd", "tranny", "transvestite", "whore", "yellow peril",
})  # fmt: skip

_UNFIT = re.compile(
    r"offensive|disparag|derogat|obscen|vulgar|pejorative|contempt\b|insult|ethnic|slur|\bracis|"
    r"sexual|genital|coitus|copulat|intercourse|prostitut|\bpenis|phall|vagina|testic|\bsemen|\banus|"
    r"masturbat|orgasm|erotic|lewd|pornograph|brothel|\brape|\bnude|naked|breasts?\b|buttock|"
    r"excrement|feces|faeces|urine|urinat|defecat|\bslang|stupid|ugly|mentally|retarded|negro|"
    r"black (?:person|people|man|woman)|white (?:person|people|man|woman)|\bjews?\b|\bjewish|"
    r"suicide|narcotic|\bdrugs?\b|barbiturate|cocaine|heroin\b|marijuana|"
    r"\bslave|\bnazi|concubine|promiscuous|seduc",
    re.IGNORECASE,
)


def is_fit_word(word: str) -> bool:
    """Says whether `word` may be an entry at all."""
    return EXCLUDED_WORDS.isdisjoint([word, *word.split(" ")])


def is_fit_gloss(gloss: str) -> bool:
    """Says whether a whole WordNet gloss is fit to be shown; examples in it count too."""
    return _UNFIT.search(gloss) is None
