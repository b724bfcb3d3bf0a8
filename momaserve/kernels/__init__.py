"""Functions on tensors. Every kernel has its plain-torch twin in `reference`."""
