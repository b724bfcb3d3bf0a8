"""llama.cpp by its own C interface: one batch a step over parallel sequences, greedy sampler."""

from __future__ import annotations

import ctypes
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf_file  # type: ignore[import-not-found]
import llama_cpp.llama_cpp as c  # type: ignore[import-not-found]

_MIN_BATCH = 2048
"""llama.cpp's own default of n_batch, tokens of one call."""


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        path = Path(job["model"]) / f"{job['dtype']}.gguf"
        gguf_file.write_gguf(Path(job["model"]), path, job["dtype"])
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        self._threads = int(job["threads"])
        self._sampler = c.llama_sampler_init_greedy()
        self._context: Any = None
        self._context_shape = (0, 0, 0)
        described = ctypes.create_string_buffer(256)
        c.llama_model_desc(self._model, described, len(described))
        self.versions = {
            "llama-cpp-python": version("llama-cpp-python"),
            "gguf": version("gguf"),
        }
        self.settings = {
            "model": described.value.decode(),
            "num_parameters": int(c.llama_model_n_params(self._model)),
            "system": c.llama_print_system_info().decode(),
            "flash_attention": "auto",
            "kv_dtype": "float16",
            "n_ubatch": int(c.llama_context_default_params().n_ubatch),
            "threads": self._threads,
        }

    def run(
        self, prompts: list[list[int]], num_new: int, pictures: list[bool]
    ) -> tuple[list[list[int]], list[list[float]]]:
        num_rows, num_prompt = len(prompts), sum(map(len, prompts))
        self._prepare(num_rows, max(map(len, prompts)) + num_new, num_prompt)
        tokens: list[list[int]] = [[] for _ in prompts]
        times: list[float] = []
        batch = c.llama_batch_init(max(num_prompt, num_rows), 0, 1)
        try:
            started = time.perf_counter()
            c.llama_memory_clear(c.llama_get_memory(self._context), True)
            lasts = _fill(batch, [list(enumerate(prompt)) for prompt in prompts])
            for step in range(num_new):
                if c.llama_decode(self._context, batch) != 0:
                    raise RuntimeError("llama_decode failed")
                for row, last in enumerate(lasts):
                    token = int(c.llama_sampler_sample(self._sampler, self._context, last))
                    tokens[row].append(token)
                times.append(time.perf_counter() - started)
                rows = zip(prompts, tokens, strict=True)
                lasts = _fill(batch, [[(len(prompt) + step, new[-1])] for prompt, new in rows])
        finally:
            c.llama_batch_free(batch)
        return tokens, [list(times) for _ in prompts]

    def _prepare(self, num_rows: int, num_tokens: int, num_prompt: int) -> None:
        """A context of this many sequences of this many tokens; the one at hand if it fits."""
        shape = (num_rows, num_tokens, num_prompt)
        if shape == self._context_shape:
            return
        if self._context is not None:
            c.llama_free(self._context)
        params = c.llama_context_default_params()
        params.n_seq_max = num_rows
        params.n_ctx = num_rows * (-(-num_tokens // 256) * 256)
        params.n_batch = max(_MIN_BATCH, num_prompt)
        params.n_threads = params.n_threads_batch = self._threads
        self._context = c.llama_init_from_model(self._model, params)
        self._context_shape = shape
        if not self._context:
            self._context, self._context_shape = None, (0, 0, 0)
            raise RuntimeError(f"llama.cpp makes no context of {num_rows} sequences")


def _fill(batch: Any, rows: list[list[tuple[int, int]]]) -> list[int]:
    """Put (position, token) pairs of all sequences into a batch; logits for the last of each.

    Returns:
        The place of each sequence's last token.
    """
    place = 0
    lasts: list[int] = []
    for sequence, pairs in enumerate(rows):
        for position, token in pairs:
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = 0
            place += 1
        batch.logits[place - 1] = 1
        lasts.append(place - 1)
    batch.n_tokens = place
    return lasts
