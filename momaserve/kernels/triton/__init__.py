"""The engine's arithmetic for NVIDIA GPUs, written in Triton. `kernels.reference` is its oracle.

Every launcher has a twin of the same signature in plain torch, in `kernels.reference` or a file
beside it. Grids and scratch sizes are functions of shapes alone and nothing waits for the device,
so a captured CUDA graph serves every mix of modalities, lengths and routings. Sums, statistics
and angles are float32 whatever the inputs. Letters as in `kernels.reference`.
"""
