"""The modalities of a token. A token's modality is a pure function of its id."""

from __future__ import annotations

from enum import IntEnum


class Modality(IntEnum):
    """Values are stored in device tensors, so they are small integers."""

    TEXT = 0
    IMAGE = 1

    @property
    def label(self) -> str:
        """The name used in configuration files, metrics and the API."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Modality:
        """Inverse of `label`; raises KeyError for an unknown name."""
        return cls[label.upper()]
