"""The rooms that touch the device: KV storage, step inputs, sampling, the forward pass."""
