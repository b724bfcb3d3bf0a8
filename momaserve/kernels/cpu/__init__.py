"""The engine's arithmetic for CPUs, compiled by numba. `kernels.reference` is its oracle.

Activations are float32 NumPy arrays. Weights are float32, or bfloat16 as the uint16 of their upper
halves, which are widened as they are read: a bfloat16 checkpoint is computed exactly as if it had
been converted, at half the memory traffic. Letters as in `kernels.reference`.

Every kernel computes each row on its own, whatever its mates, but for the order of sums.
"""
