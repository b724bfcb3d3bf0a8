"""The four curves of `bench growth`, measured on an engine in this process."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.random_weights import ordinary_token_ids
from momaserve.outputs import FinishReason, TokenOutput
from momaserve.request import Submission
from momaserve.runner.kv_storage import block_bytes
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.tokens.prompt import Prompt
from momaserve_bench.batch_run import EngineFailedError, run_batch
from momaserve_bench.growth_curve import Curve
from momaserve_bench.offline import GREEDY, run_offline
from momaserve_bench.resident import resident_bytes
from momaserve_bench.workload import ModelShape, WorkloadSpec

WAVES = 2
"""Requests of the curve of throughput for each of those at the same time."""
HELD_PROMPT_TOKENS = 512
"""Prompt tokens of a request that only holds memory, at most."""


class GrowthBench:
    """Measures on one engine. No two requests have the same cache salt, so nothing is spared."""

    def __init__(self, engine: Engine, *, num_iters: int, seed: int) -> None:
        self._engine = engine
        self._num_iters = num_iters
        self._seed = seed
        self._ids: list[int] = ordinary_token_ids(engine.model_config, Modality.TEXT).tolist()
        self._num_submissions = 0

    # --- throughput --------------------------------------------------------------------------

    def throughput(self, counts: Sequence[int], prompt_len: int, output_len: int) -> Curve:
        """Output tokens per second by requests at the same time, two waves of them."""
        shape = ModelShape.from_engine(self._engine)
        measured = []
        for count in counts:
            spec = WorkloadSpec(
                num_prompts=WAVES * count,
                input_len=prompt_len,
                output_len=output_len,
                seed=self._seed,
            )
            items = spec.make(shape)
            runs = [
                run_offline(self._engine, items, concurrency=count, salt=f"{count} at a time {i}")
                for i in range(1 + self._num_iters)
            ][1:]  # the first one warms up
            rates = [run.text_tokens / run.elapsed_s for run in runs]
            measured.append((float(count), median(rates), {"output_throughputs": rates}))
        return Curve.through("throughput", "concurrency", "output_throughput", measured, lowest=0.0)

    def check_concurrency(self, count: int, num_tokens: int) -> None:
        """Raises ConfigError when KV blocks do not hold so many requests of so many tokens."""
        cache = self._engine.scheduler.kv_cache
        needed = count * cache.blocks_for(num_tokens)
        if needed > cache.num_blocks:
            raise ConfigError(
                f"--concurrency {count} needs {needed} KV blocks, and there are "
                f"{cache.num_blocks}: give a larger --kv-cache-bytes"
            )

    # --- one request alone -------------------------------------------------------------------

    def first_tokens(self, lengths: Sequence[int]) -> Curve:
        """Milliseconds to the first token of a request alone, by prompt length.

        Attention over a prompt costs the square of its length, so an exponent of 2 is what a very
        long one has.
        """
        self._first_token_s(lengths[0])
        measured = []
        for length in lengths:
            times = [1e3 * self._first_token_s(length) for _ in range(self._num_iters)]
            measured.append((float(length), median(times), {"ttfts_ms": times}))
        return Curve.through("first_token", "input_len", "ttft_ms", measured, highest=2.0)

    def _first_token_s(self, length: int) -> float:
        submission = self._submission(length, 1)
        started = time.perf_counter()
        self._engine.add(submission)
        outputs = self._step_until_output()
        elapsed = time.perf_counter() - started
        assert outputs[0].finish_reason is not None
        return elapsed

    def decoding(self, contexts: Sequence[int], output_len: int) -> Curve:
        """Milliseconds per token of a request alone, by the mean of what its tokens see."""
        run_batch(self._engine, [self._submission(contexts[0], output_len)])
        measured = []
        for context in contexts:
            times, num_steps = [], 0
            for _ in range(self._num_iters):
                run = run_batch(self._engine, [self._submission(context, output_len)])
                num_steps = run.num_decode_steps
                times.append(1e3 * run.decode_s / num_steps)
            # The first of them is the prompt's; each of the others sees itself and all before.
            seen = context + (num_steps + 1) / 2
            details = {"context": context, "ms_per_tokens": times}
            measured.append((seen, median(times), details))
        return Curve.through("decoding", "mean_context", "ms_per_token", measured, highest=1.0)

    # --- memory ------------------------------------------------------------------------------

    def memory(self, targets: Sequence[int]) -> tuple[Curve, Curve, dict[str, Any]]:
        """Bytes of KV blocks in use, and of the whole process, over tokens held.

        Requests are added until their prompts make up each target, and none ends before the last
        reading. It must be measured first: memory of blocks that were in use once stays there.

        Args:
            targets: rising, and let pass by `check_held`.

        Returns:
            Both curves, and what was there before.
        """
        engine = self._engine
        try:
            return self._memory(targets)
        finally:
            for name in list(engine.scheduler.requests):
                engine.abort(name)

    def _memory(self, targets: Sequence[int]) -> tuple[Curve, Curve, dict[str, Any]]:
        self._first_token_s(self._held_len)  # what a step needs besides is there from now on
        size = block_bytes(
            self._engine.model_config, self._engine.config.cache.block_size, self._engine.dtype
        )
        gc.collect()
        before = resident_bytes()
        blocks: list[tuple[float, float, dict[str, Any]]] = []
        whole: list[tuple[float, float, dict[str, Any]]] = []
        for target, lengths in zip(targets, self._shares(targets), strict=True):
            self._hold(lengths, target)
            tokens = sum(
                request.sequence.num_computed_tokens
                for request in self._engine.scheduler.requests.values()
            )
            cache = self._engine.scheduler.kv_cache
            in_use = (cache.num_blocks - cache.num_free_blocks) * size
            gc.collect()
            now = resident_bytes()
            num_requests = len(self._engine.scheduler.requests)
            details = {"wanted_tokens": target, "num_requests": num_requests}
            blocks.append((float(tokens), float(in_use), details))
            whole.append((float(tokens), float(now.num_bytes), {}))
        base = {
            "resident_bytes": before.num_bytes,
            "resident_source": before.source,
            "kv_bytes_of_all_blocks": self._engine.scheduler.kv_cache.num_blocks * size,
            "kv_bytes_per_token": size / self._engine.config.cache.block_size,
        }
        return (
            Curve.through("kv_memory", "held_tokens", "kv_bytes", blocks, highest=1.0),
            Curve.through("process_memory", "held_tokens", "resident_bytes", whole, highest=1.0),
            base,
        )

    @property
    def _held_len(self) -> int:
        """Prompt tokens of a request that holds memory: it must not end while others begin."""
        return min(HELD_PROMPT_TOKENS, max(1, self._engine.max_model_len // 2))

    def _shares(self, targets: Sequence[int]) -> list[list[int]]:
        """For each target the prompt lengths of the requests that are added to reach it."""
        shares = []
        for before, target in zip((0, *targets), targets, strict=False):
            whole, rest = divmod(target - before, self._held_len)
            shares.append([self._held_len] * whole + [rest] * bool(rest))
        return shares

    def check_held(self, targets: Sequence[int]) -> None:
        """Raises ConfigError when so many tokens cannot be held at the same time."""
        lengths = [length for share in self._shares(targets) for length in share]
        most = self._engine.config.scheduler.max_num_requests
        if len(lengths) > most:
            raise ConfigError(
                f"--held-tokens {targets[-1]} takes {len(lengths)} requests, and at most {most} "
                "run at the same time: give a larger --max-num-requests"
            )
        cache = self._engine.scheduler.kv_cache
        # One block more for each, since they decode meanwhile, and those of the first request.
        needed = sum(cache.blocks_for(length) + 1 for length in (*lengths, self._held_len))
        if needed > cache.num_blocks:
            raise ConfigError(
                f"--held-tokens {targets[-1]} needs about {needed} KV blocks, and there are "
                f"{cache.num_blocks}: give a larger --kv-cache-bytes"
            )

    def _hold(self, lengths: Sequence[int], target: int) -> None:
        """Adds requests and steps until each of them has computed its prompt."""
        waiting = set()
        room = self._engine.max_model_len
        for length in lengths:
            submission = self._submission(length, room - length)
            self._engine.add(submission)
            waiting.add(submission.request_ids[0])
        while waiting:
            for output in self._step_until_output():
                if output.finish_reason is not None:
                    raise ConfigError(
                        f"--held-tokens {target}: a request of {room} tokens ended before the "
                        "last one began; give a larger --max-num-step-tokens"
                    )
                waiting.discard(output.request_id)

    # --- requests ----------------------------------------------------------------------------

    def _step_until_output(self) -> list[TokenOutput]:
        """Raises EngineFailedError for a request that the engine could not compute."""
        while True:
            outputs = self._engine.step()
            for output in outputs:
                if output.finish_reason in (FinishReason.ERROR, FinishReason.TIMEOUT):
                    raise EngineFailedError(output.error or "a request timed out")
            if outputs:
                return outputs

    def _submission(self, prompt_len: int, max_tokens: int) -> Submission:
        """A request for words, greedy and exactly as long as asked."""
        name = f"growth-{self._num_submissions}"
        self._num_submissions += 1
        rng = random.Random(f"{self._seed} {name}")
        bos = self._engine.model_config.bos_token_id
        ids = (bos, *rng.choices(self._ids, k=prompt_len - 1))
        params = SamplingParams(
            mode=OutputMode.TEXT,
            max_tokens=max_tokens,
            text=GREEDY,
            image=GREEDY,
            ignore_eos=True,
            seed=0,
            cache_salt=name,
        )
        return self._engine.make_submission(Prompt(ids), params, name)
