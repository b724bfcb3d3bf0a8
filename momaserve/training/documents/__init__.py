"""Training data that users bring: folders or JSON-lines files of interleaved text and pictures."""
