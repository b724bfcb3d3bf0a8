"""Checks and times the Triton backend on a GPU: `benchmarks/gpu.sh`, or `python -m` this package.

Needs torch, triton and numpy; only `peers` needs transformers, and nothing of the server's own.
"""
