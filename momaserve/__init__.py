"""momaserve: inference and serving engine for modality-aware sparse models."""

__version__ = "0.1.0"
