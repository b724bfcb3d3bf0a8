"""momaserve by the same protocol: `Engine.step` in a loop, no prefix cache."""

from __future__ import annotations

import time
from typing import Any

import torch

import momaserve
from momaserve.llm import LLM
from momaserve.sampling import Distribution, OutputMode, SamplingParams

_GREEDY = Distribution(temperature=0.0)


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        llm = LLM(
            job["model"],
            dtype=job["dtype"],
            threads=job["threads"],
            device="cpu",
            prefix_caching=False,
            max_num_requests=job["max_batch_size"],
            kv_cache_bytes=job["kv_cache_bytes"],
        )
        self._llm = llm
        self._engine = llm.engine
        self._runs = 0
        self._experts_per_token: dict[str, float | None] = {}
        config = self._engine.config
        self.versions = {"momaserve": momaserve.__version__, "torch": str(torch.__version__)}
        self.settings: dict[str, Any] = {
            "dtype": str(self._engine.dtype).removeprefix("torch."),
            "routing": str(config.routing),
            "prefix_caching": config.cache.prefix_caching,
            "max_num_step_tokens": config.scheduler.max_num_step_tokens,
            "block_size": config.cache.block_size,
            "experts_per_token": self._experts_per_token,
            "threads": torch.get_num_threads(),
        }

    def run(
        self, prompts: list[list[int]], num_new: int, pictures: list[bool]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """A row that draws ends its prompt with begin_image, and is aborted when it has enough:
        a picture cannot end early by itself. The first run of each kind, which is not counted,
        also finds how many experts its tokens have."""
        engine = self._engine
        self._runs += 1
        names = [f"{self._runs}-{row}" for row in range(len(prompts))]
        tokens: dict[str, list[int]] = {name: [] for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        kind = f"{len(prompts)}x{len(prompts[0])}, {sum(pictures)} draw"
        is_first = kind not in self._experts_per_token
        num_experts: list[int] = []
        started = time.perf_counter()
        for name, prompt, draws in zip(names, prompts, pictures, strict=True):
            params = self._params(num_new, draws, is_first)
            engine.add(engine.make_submission(self._llm.encode(prompt), params, name))
        while engine.has_work:
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                if output.error is not None:
                    raise RuntimeError(f"a request failed: {output.error}")
                name = output.request_id
                tokens[name] += output.token_ids
                times[name] += [now] * len(output.token_ids)
                for token in output.routing:
                    num_experts += [len(chosen or ()) for chosen in token.experts]
                if len(tokens[name]) >= num_new and output.finish_reason is None:
                    engine.abort(name)
        if is_first:  # one new token alone is never computed, and has no experts
            mean = sum(num_experts) / len(num_experts) if num_experts else None
            self._experts_per_token[kind] = mean
        # The last code of a picture brings end_image along, which nobody asked for.
        return (
            [tokens[name][:num_new] for name in names],
            [times[name][:num_new] for name in names],
        )

    def _params(self, num_new: int, draws: bool, is_traced: bool) -> SamplingParams:
        return SamplingParams(
            mode=OutputMode.IMAGE if draws else OutputMode.TEXT,
            max_tokens=max(num_new, self._engine.processor.spec.num_image_span_tokens)
            if draws
            else num_new,
            text=_GREEDY,
            image=_GREEDY,
            ignore_eos=True,
            seed=0,
            include_routing=is_traced,
        )
