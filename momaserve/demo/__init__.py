"""The embedded demo checkpoint: an illustrated dictionary. Its card is `checkpoint/README.md`."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Directory of the embedded checkpoint."""
