"""`momaserve bench core`: what planning a step costs, and what a cached token takes.

No model runs: tokens come from a random number generator.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from momaserve.config import RoutingPolicy, SchedulerConfig
from momaserve.core.block_key import root_key
from momaserve.core.kv_cache import KVCache
from momaserve.core.scheduler import Scheduler
from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.presets import preset_config
from momaserve.request import Request, TokenSequence
from momaserve.runner.kv_storage import KVStorage
from momaserve.sampling import SamplingParams
from momaserve_bench.report import percentile, print_result, print_table

_VOCABULARY = 65536
_PARAMS = SamplingParams()


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for counts that are not positive."""
    for name in ("running", "tokens", "steps", "block_size"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    planning = [
        {"load": load, "num_running": count, **_time_steps(load, count, args)}
        for load in ("decode", "mixed")
        for count in args.running
    ]
    print_table(
        f"schedule() + update(), {args.steps} steps",
        ("load", "running", "median us", "p90 us", "median us per request"),
        [
            (
                row["load"],
                row["num_running"],
                row["median_us"],
                row["p90_us"],
                row["median_us"] / row["num_running"],
            )
            for row in planning
        ],
    )
    config = preset_config(args.preset)
    memory = [_memory(config, tokens, args.block_size) for tokens in args.tokens]
    print_table(
        f"KV bytes per cached token of {args.preset} in bfloat16, blocks of {args.block_size}, "
        "over the arithmetic minimum",
        ("tokens per request", "bytes per token", "ratio"),
        [(row["num_tokens"], row["bytes_per_token"], row["ratio"]) for row in memory],
    )
    settings = {key: value for key, value in vars(args).items() if key != "bench"}
    print_result("core", settings, {"planning": planning, "kv_memory": memory})
    return 0


def _time_steps(load: str, num_running: int, args: argparse.Namespace) -> dict[str, float]:
    """Times of steps with a constant number of running requests.

    "decode": all of them generate. "mixed": each ends after 64 tokens and is replaced by one
    with a prompt of 256 tokens, half of which others have too.
    """
    rng = random.Random(args.seed)
    is_mixed = load == "mixed"
    course = 64 if is_mixed else args.steps + 8
    prompts = 256 if is_mixed else 32
    num_blocks = 2 * num_running * -(-(prompts + course) // args.block_size)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_requests=num_running,
            max_num_step_tokens=max(1024, 2 * num_running),
            max_queued_requests=2 * num_running,
        ),
        num_blocks=num_blocks,
        block_size=args.block_size,
    )
    prefix = [rng.randrange(_VOCABULARY) for _ in range(prompts // 2)]
    number = 0

    def arrive() -> None:
        nonlocal number
        own = [rng.randrange(_VOCABULARY) for _ in range(prompts // 2)]
        # Courses of different lengths, so that not all end in one step.
        length = course if not is_mixed else rng.randrange(course // 2, course * 2)
        scheduler.add_all([_request(f"r{number}", [*prefix, *own], length)])
        number += 1

    times: list[float] = []
    for _ in range(num_running):
        arrive()
    while len(times) < args.steps:
        started = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter() - started
        sampled = {name: [rng.randrange(_VOCABULARY)] for name in plan.samples}
        requests = scheduler.requests
        ended = {
            n for n in plan.samples if requests[n].num_tokens + 1 >= requests[n].max_num_tokens
        }
        is_full = len(plan.samples) > num_running // 2
        started = time.perf_counter()
        scheduler.update(plan, sampled, ended)
        if is_full:  # not while the first prompts are still being computed
            times.append(planned + time.perf_counter() - started)
        for _ in ended:
            arrive()
    return {
        "median_us": 1e6 * statistics.median(times),
        "p90_us": 1e6 * percentile(times, 0.9),
        "max_us": 1e6 * max(times),
    }


def _request(name: str, prompt: list[int], num_output: int) -> Request:
    return Request(
        request_id=name,
        sequence=TokenSequence(
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            routing=RoutingPolicy.CAUSAL,
            prompt_routing=RoutingPolicy.CAUSAL,
            root_key=root_key(None),
        ),
        params=_PARAMS,
        seed=0,
        max_num_tokens=len(prompt) + num_output,
    )


def _memory(config: ModelConfig, num_tokens: int, block_size: int) -> dict[str, float]:
    """Bytes that a request of this length holds, as cache and storage give them out."""
    cache = KVCache(-(-num_tokens // block_size) + 1, block_size)
    sequence = _request("r", [0] * num_tokens, 1).sequence
    assert cache.grow(sequence, num_tokens) is not None
    storage = KVStorage(
        config,
        num_blocks=cache.num_blocks,
        block_size=block_size,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    per_block = storage.num_bytes / cache.num_blocks
    heads, size = config.num_key_value_heads, config.head_dim
    minimum = num_tokens * 2 * config.num_hidden_layers * heads * size * 2
    num_bytes = len(sequence.blocks) * per_block
    return {
        "num_tokens": num_tokens,
        "kv_bytes": num_bytes,
        "bytes_per_token": num_bytes / num_tokens,
        "ratio": num_bytes / minimum,
    }
