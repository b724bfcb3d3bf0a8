"""What a data set turned out to hold, for people: documents, tokens, and what was skipped why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from momaserve.training.documents.document import Document
from momaserve.training.documents.record import Skipped

MAX_EXAMPLES = 3


class SkipCounts:
    """How many records were skipped for each reason, with the first few of them."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, skipped: Skipped) -> None:
        reason = skipped.reason
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            shown = f"{skipped.where} ({skipped.detail})" if skipped.detail else skipped.where
            examples.append(shown)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        """Lines, most frequent reason first; each begins with a line break."""
        lines = []
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"\n  {count:>9,}  {reason}, for instance:")
            lines += [f"\n             {example}" for example in self.examples[reason]]
        return "".join(lines)


@dataclass(slots=True)
class Summary:
    """Counts of one reading."""

    num_documents: int = 0
    num_chats: int = 0
    """Documents among them that are conversations."""
    num_pictures: int = 0
    num_text_tokens: int = 0
    num_image_tokens: int = 0
    num_learnt_tokens: int = 0
    longest: int = 0
    """Tokens of the longest document."""
    skips: SkipCounts = field(default_factory=SkipCounts)

    def count(self, document: Document, tokens_per_image: int) -> None:
        """Add one document."""
        num_image_tokens = document.num_pictures * tokens_per_image
        self.num_documents += 1
        self.num_chats += document.is_chat
        self.num_pictures += document.num_pictures
        self.num_image_tokens += num_image_tokens
        self.num_text_tokens += len(document.token_ids) - num_image_tokens
        self.num_learnt_tokens += sum(document.learnt)
        self.longest = max(self.longest, len(document.token_ids))

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if name != "skips"}
        skips = {"counts": self.skips.counts, "examples": self.skips.examples}
        return json.dumps({**values, "skips": skips})

    @classmethod
    def from_json(cls, text: str) -> Summary:
        values: Mapping[str, Any] = json.loads(text)
        summary = cls(**{name: value for name, value in values.items() if name != "skips"})
        summary.skips.counts = dict(values["skips"]["counts"])
        summary.skips.examples = dict(values["skips"]["examples"])
        return summary

    def __str__(self) -> str:
        num_tokens = self.num_text_tokens + self.num_image_tokens
        return (
            f"documents  {self.num_documents:,} ({self.num_chats:,} conversations), "
            f"{self.num_pictures:,} pictures in them\n"
            f"tokens     {num_tokens:,}: text {self.num_text_tokens:,}, image "
            f"{self.num_image_tokens:,}; {self.num_learnt_tokens:,} are learnt; "
            f"longest document {self.longest:,}\n"
            f"skipped    {self.skips.total:,}{self.skips}"
        )
