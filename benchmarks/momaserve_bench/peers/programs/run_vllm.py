"""vLLM for CPUs, in this one process: its default scheduling and compilation, no prefix cache."""

from __future__ import annotations

import os

# Read when vllm is imported. A process of its own for the engine would poll for work while idle.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import time
from typing import Any

import torch
import vllm  # type: ignore[import-not-found]


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        self._llm = vllm.LLM(
            model=job["model"],
            dtype=job["dtype"],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=job["max_model_len"],
            max_num_seqs=job["max_batch_size"],
            kv_cache_memory_bytes=job["kv_cache_bytes"],
            seed=0,
            disable_log_stats=True,
        )
        self._runs = 0
        config = self._llm.llm_engine.vllm_config
        self.versions = {"vllm": str(vllm.__version__), "torch": str(torch.__version__)}
        self.settings = {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "block_size": config.cache_config.block_size,
            "compilation": config.compilation_config.mode.name,
            "compiler": config.compilation_config.backend,
            "processes": 1,
            "threads": torch.get_num_threads(),
            "preloaded": os.path.basename(os.environ.get("LD_PRELOAD", "")),
        }

    def run(
        self, prompts: list[list[int]], num_new: int, pictures: list[bool]
    ) -> tuple[list[list[int]], list[list[float]]]:
        engine = self._llm.llm_engine
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False
        )
        self._runs += 1
        names = [f"{self._runs}-{row}" for row in range(len(prompts))]
        tokens: dict[str, list[int]] = {name: [] for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        started = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                ids = list(output.outputs[0].token_ids)
                had = len(tokens[output.request_id])
                tokens[output.request_id] = ids
                times[output.request_id] += [now] * (len(ids) - had)
        return [tokens[name] for name in names], [times[name] for name in names]
