"""The embedded demo checkpoint: this directory. Its card is `README.md` beside this file."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent
"""Directory of the embedded checkpoint."""
