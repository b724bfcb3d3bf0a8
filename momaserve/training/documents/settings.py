"""What may be chosen about training data that users bring."""

from __future__ import annotations

from dataclasses import dataclass

from momaserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentSettings:
    """How a data set becomes rows of tokens. Says nothing about where it lies."""

    text_vocab_size: int = 4096
    """Ids of the text tokenizer that is trained if there is none yet."""
    row_length: int
    """Tokens in a row; a document longer than this is skipped (or cut, see `split_long`)."""
    num_rows: int
    """Rows in a step."""
    validation_share: float = 0.02
    """Share of the documents kept from training, in (0, 1)."""
    split_long: bool = False
    """Cut documents of plain text that are too long into several, instead of skipping them."""
    max_validation_batches: int = 64
    """Batches that `validation_batches` gives at most; what does not fit into them stays unused."""
    seed: int = 0
    """Of the order of documents, the split, and which of a picture and its words comes first."""

    def __post_init__(self) -> None:
        limits = {
            "text_vocab_size": 262,
            "row_length": 4,
            "num_rows": 1,
            "max_validation_batches": 1,
        }
        for name, minimum in limits.items():
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise ConfigError(f"{name} must be an integer >= {minimum}, got {value!r}")
        share = self.validation_share
        if type(share) is not float or not 0 < share < 1:
            raise ConfigError(f"validation_share must be in (0, 1), got {share!r}")
        if type(self.split_long) is not bool:
            raise ConfigError(f"split_long must be true or false, got {self.split_long!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"seed must be an integer >= 0, got {self.seed!r}")
