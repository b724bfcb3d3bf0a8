"""momaserve by the same protocol: `Engine.step` in a loop, no prefix cache."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import momaserve
from momaserve import engine as ours
from momaserve.llm import LLM, engine_config
from momaserve.request import Submission
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve_bench.batch_run import LoadCounter, mean_step_bytes, run_batch
from momaserve_bench.engine_setup import preset_parts
from momaserve_bench.roof import mean_distinct_experts

_STATUS = Path("/proc/self/status")


class Engine:
    """A job may also have `image_tokens` (codes of a preset's pictures), `temperature` (0 without
    it) and `max_num_step_tokens`."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._engine = _load(job)
        self._llm = LLM(self._engine)
        self._how = Distribution(temperature=job.get("temperature", 0.0))
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
        kind = f"{len(prompts)}x{len(prompts[0])}, {sum(pictures)} draw"
        is_first = kind not in self._experts_per_token
        started = time.perf_counter()
        submissions = self._submissions(prompts, num_new, pictures, is_first)
        names = [submission.request_ids[0] for submission in submissions]
        tokens: dict[str, list[int]] = {name: [] for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        num_experts: list[int] = []
        for submission in submissions:
            engine.add(submission)
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

    def touched(
        self, prompts: list[list[int]], num_new: int, pictures: list[bool]
    ) -> dict[str, Any]:
        """What decoding steps of this run read at least, on average, and how many experts of a
        layer that is. Runs it once more, watched; pictures must have `num_new` codes."""
        counter = LoadCounter(self._engine.model_config)
        run_batch(self._engine, self._submissions(prompts, num_new, pictures, False), counter)
        mean = mean_step_bytes(self._engine, counter.loads)
        return {
            "bytes_per_step": mean.total,
            "parts": asdict(mean),
            "distinct_experts": mean_distinct_experts(counter.loads),
        }

    def memory(self) -> dict[str, int | None]:
        """Bytes of this process in memory, now and at most so far; None where nobody tells."""
        lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.exists() else []
        found = dict(line.split(":", 1) for line in lines)
        sizes = {"resident_bytes": "VmRSS", "peak_resident_bytes": "VmHWM"}
        return {
            name: 1024 * int(found[key].split()[0]) if key in found else None
            for name, key in sizes.items()
        }

    def _submissions(
        self, prompts: list[list[int]], num_new: int, pictures: list[bool], is_traced: bool
    ) -> list[Submission]:
        """Row i draws with seed i, so that the same prompts get the same tokens again."""
        self._runs += 1
        return [
            self._engine.make_submission(
                self._llm.encode(prompt),
                self._params(num_new, draws, is_traced, seed=row),
                f"{self._runs}-{row}",
            )
            for row, (prompt, draws) in enumerate(zip(prompts, pictures, strict=True))
        ]

    def _params(self, num_new: int, draws: bool, is_traced: bool, seed: int) -> SamplingParams:
        return SamplingParams(
            mode=OutputMode.IMAGE if draws else OutputMode.TEXT,
            max_tokens=max(num_new, self._engine.processor.spec.num_image_span_tokens)
            if draws
            else num_new,
            text=self._how,
            image=self._how,
            ignore_eos=True,
            seed=seed,
            include_routing=is_traced,
        )


def _load(job: dict[str, Any]) -> ours.Engine:
    options = {
        "dtype": job["dtype"],
        "threads": job["threads"],
        "device": "cpu",
        "prefix_caching": False,
        "max_num_requests": job["max_batch_size"],
        "kv_cache_bytes": job["kv_cache_bytes"],
    }
    if "max_num_step_tokens" in job:
        options["max_num_step_tokens"] = job["max_num_step_tokens"]
    config = engine_config(options)
    if "image_tokens" not in job:
        return ours.Engine.load(job["model"], config)
    return ours.Engine(preset_parts(job["model"], job["image_tokens"], config), config)
