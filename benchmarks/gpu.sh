#!/usr/bin/env bash
# Checks the Triton backend on a GPU, times it, holds it beside transformers, and tries other tile sizes.
#
#   benchmarks/gpu.sh check|time|peers|tune|all [--seed N] [--limit S] [--out DIR]
#
# Needs a Python with torch for CUDA, triton, numpy, safetensors, tokenizers and pillow, and for
# `peers` transformers; nothing is installed or downloaded. PYTHON names another interpreter than
# python3, OUT another folder than benchmarks/results for gpu-PART.json. `all` is check, time and peers.
# The exit status is 1 if a check or a measurement fails.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root:$root/server:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -u -m momaserve_bench.gpu --out "${OUT:-$root/benchmarks/results}" "$@"
