"""Training of the demo checkpoint: its data, its picture tokenizer and its language model."""
