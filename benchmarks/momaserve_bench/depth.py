"""`momaserve bench depth`: what mixture of depths saves, against the same shape without it."""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from momaserve.config import EngineConfig
from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.layers.block import Block
from momaserve.loading import PRESET_SEED, ModelParts, load_model_parts
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.info import describe
from momaserve.models.moma import MomaModel
from momaserve.models.random_weights import ordinary_token_ids, random_model
from momaserve.outputs import RequestStats
from momaserve.request import Submission
from momaserve.runner.kv_storage import block_bytes
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve.stats import StepStats
from momaserve.tokens.prompt import Prompt
from momaserve_bench.batch_run import LoadCounter, mean_step_bytes, run_batch
from momaserve_bench.engine_setup import settings_of
from momaserve_bench.report import check_writable, print_result, print_table
from momaserve_bench.roof import measure_read_bandwidth
from momaserve_server.cli_options import engine_config, model_source

GIB = 1 << 30
LEAST_SAVING = 0.10
"""Of what is predicted: below it, the share that is realised says nothing."""
HELD_OUTPUT_LEN = 16


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for settings that cannot work, CheckpointError for a broken model."""
    check_arguments(args)
    check_writable("--save-result", args.save_result)
    pair = Pair.load(args)
    report = {
        "kv": kv_bytes(pair, args),
        "held": held(pair, args),
        **times(pair, args),
    }
    show(report)
    settings = settings_of(args, pair.routed.model_name)
    settings["dtype"] = str(pair.routed.dtype).split(".")[-1]
    print_result("depth", settings, report, save=args.save_result)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers out of their range."""
    lowest = {
        "input_len": 1,
        "output_len": 2,
        "context_len": 1,
        "held_len": 1,
        "held": 1,
        "num_iters": 1,
        "seed": 0,
    }
    for name, low in lowest.items():
        if getattr(args, name) < low:
            raise ConfigError(
                f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}"
            )
    for size in args.batch_size:
        if size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {size}")
    if not 0 < args.roof_gib < float("inf"):
        raise ConfigError(f"--roof-gib must be above 0, got {args.roof_gib}")


# --- engines and requests --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A model with depth routing and its twin without, with as many bytes for K/V."""

    routed: Engine
    plain: Engine

    @classmethod
    def load(cls, args: argparse.Namespace) -> Pair:
        """Raises ConfigError for a model without depth routing."""
        source = model_source(args)
        config = engine_config(args)
        parts = load_model_parts(source, config)
        model_config = parts.model.config
        if model_config.depth_routing is None:
            raise ConfigError(f"{parts.name} has no depth routing: there is nothing to compare")
        twin_config = replace(model_config, depth_routing=None)
        # Packing gives the weights up, so a checkpoint's twin is copied first; a preset's has
        # random weights of its own, so that its experts take as many tokens.
        twin = None if isinstance(source, str) else _without_depth(parts.model, twin_config)
        config = _with_room(config, twin_config, parts, args)
        routed = Engine(parts, config)
        if twin is None:
            twin = random_model(
                twin_config, seed=PRESET_SEED, dtype=parts.dtype, device=parts.device
            )
        name = f"{parts.name}, every layer"
        return cls(routed=routed, plain=Engine(replace(parts, model=twin, name=name), config))


def _without_depth(model: MomaModel, config: ModelConfig) -> MomaModel:
    twin = copy.deepcopy(model)
    twin.config = config
    for block in twin.blocks:
        assert isinstance(block, Block)
        block.depth_router = None
    return twin


def _with_room(
    config: EngineConfig, twin: ModelConfig, parts: ModelParts, args: argparse.Namespace
) -> EngineConfig:
    """Memory in which the twin holds `--held` requests, or more where a timed batch needs it."""
    size = config.cache.block_size
    batches = [(n, args.input_len) for n in args.batch_size] + [(1, args.context_len)]
    num_blocks = max(
        args.held * -(-(args.held_len + HELD_OUTPUT_LEN) // size),
        # Twice, since depth-routed layers may take every token.
        *(2 * n * -(-(length + args.output_len) // size) for n, length in batches),
    )
    num_requests = max(4 * args.held, *args.batch_size)
    scheduler = replace(
        config.scheduler,
        max_num_requests=num_requests,
        max_num_step_tokens=max(config.scheduler.max_num_step_tokens, num_requests),
        max_queued_requests=max(config.scheduler.max_queued_requests, num_requests),
    )
    num_bytes = num_blocks * block_bytes(twin, size, parts.dtype)
    return replace(
        config, scheduler=scheduler, cache=replace(config.cache, kv_cache_bytes=num_bytes)
    )


class Prompts:
    """Random words; no two prompts share a beginning."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._ids: list[int] = ordinary_token_ids(engine.model_config, Modality.TEXT).tolist()
        self._rng = random.Random(seed)
        self._count = 0

    def batch(self, size: int, input_len: int, output_len: int) -> list[Submission]:
        return [self._one(input_len, output_len) for _ in range(size)]

    def _one(self, input_len: int, output_len: int) -> Submission:
        self._count += 1
        name = f"request-{self._count}"
        bos = self._engine.model_config.bos_token_id
        ids = (bos, *self._rng.choices(self._ids, k=input_len - 1))
        params = SamplingParams(
            mode=OutputMode.TEXT,
            max_tokens=output_len,
            text=Distribution(temperature=1.0),  # greedy words of random weights repeat themselves
            ignore_eos=True,
            seed=self._rng.getrandbits(32),
            cache_salt=name,
        )
        return self._engine.make_submission(Prompt(ids), params, name)


class _DepthCounter:
    """Counts what depth-routed layers took. A `StatsListener`."""

    def __init__(self) -> None:
        self.taken = self.seen = 0

    def on_step(self, stats: StepStats) -> None:
        for _, taken, skipped in stats.depth_tokens:
            self.taken += taken
            self.seen += taken + skipped

    def on_finished(self, stats: RequestStats) -> None:
        pass

    def on_rejected(self, reason: str) -> None:
        pass


# --- memory ----------------------------------------------------------------------------------


def kv_bytes(pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes that one request of `--held-len` tokens holds, the index of its entries included."""
    per_token: list[float] = []
    counter = _DepthCounter()
    for engine in (pair.routed, pair.plain):
        engine.listener = counter
        (submission,) = Prompts(engine, args.seed).batch(1, args.held_len, 2)
        engine.add(submission)
        while not engine.step():
            pass
        cache = engine.scheduler.kv_cache
        num_held = cache.num_blocks - cache.num_free_blocks
        per_token.append(num_held * engine.kv_cache_bytes / cache.num_blocks / args.held_len)
        engine.abort(submission.request_ids[0])
        engine.listener = None
    depth = pair.routed.model_config.depth_routing
    assert depth is not None
    num_layers = pair.routed.model_config.num_hidden_layers
    rate = counter.taken / counter.seen if counter.seen else 1.0
    predicted = 1 - len(depth.layers) / num_layers * (1 - rate)
    share = per_token[0] / per_token[1]
    return {
        "num_tokens": args.held_len,
        "bytes_per_token": per_token[0],
        "twin_bytes_per_token": per_token[1],
        "share": share,
        "depth_rate": rate,
        "predicted_share": predicted,
        "deviation": share / predicted - 1,
    }


def held(pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """Requests that run at the same time, at the most, before the first of them ends."""
    most: list[int] = []
    for engine in (pair.routed, pair.plain):
        count = engine.config.scheduler.max_num_requests
        for submission in Prompts(engine, args.seed).batch(count, args.held_len, HELD_OUTPUT_LEN):
            engine.add(submission)
        most.append(0)
        while engine.has_work:
            outputs = engine.step()
            most[-1] = max(most[-1], engine.scheduler.num_running)
            if any(output.finish_reason is not None for output in outputs):
                break  # from here on others take the room of those that ended
        for name in list(engine.scheduler.requests):
            engine.abort(name)
    return {
        "kv_cache_bytes": pair.plain.kv_cache_bytes,
        "num_tokens": args.held_len + HELD_OUTPUT_LEN,
        "requests": most[0],
        "twin_requests": most[1],
        "ratio": most[0] / most[1],
    }


# --- time ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What both engines do in turns."""

    name: str
    batch_size: int
    input_len: int
    output_len: int
    is_prefill: bool = False


def times(pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """Decoding and prefill of both, in turns, beside what bytes and operations predict."""
    works = [
        *(_Work(name="decode", batch_size=n, input_len=args.input_len, output_len=args.output_len)
          for n in args.batch_size),
        _Work(name="decode, long context", batch_size=1, input_len=args.context_len,
              output_len=args.output_len),
        _Work(name="prefill", batch_size=1, input_len=args.context_len, output_len=2,
              is_prefill=True),
    ]  # fmt: skip
    engines = (pair.routed, pair.plain)
    device = engines[0].model.embed_tokens.device
    bandwidth = measure_read_bandwidth(int(args.roof_gib * GIB), device=device)
    prompts = [Prompts(engine, args.seed) for engine in engines]
    results = [_measure(work, engines, prompts, bandwidth, args.num_iters) for work in works]
    return {"read_bandwidth_bytes_per_s": bandwidth, "times": results}


def _measure(
    work: _Work,
    engines: Sequence[Engine],
    prompts: Sequence[Prompts],
    bandwidth: float,
    num_iters: int,
) -> dict[str, Any]:
    taken: list[list[float]] = [[], []]
    for number in range(1 + num_iters):  # the first one warms up
        for engine, some, found in zip(engines, prompts, taken, strict=True):
            batch = some.batch(work.batch_size, work.input_len, work.output_len)
            run = run_batch(engine, batch)
            if number:
                step_s = run.decode_s / run.num_decode_steps
                found.append(run.prefill_s if work.is_prefill else step_s)
    seconds, twin_seconds = median(taken[0]), median(taken[1])
    result: dict[str, Any] = {
        **asdict(work),
        "seconds": seconds,
        "twin_seconds": twin_seconds,
        "all_seconds": taken,
        "saved": 1 - seconds / twin_seconds,
    }
    if work.is_prefill:
        flops = [_prompt_flops(engine, work.input_len) for engine in engines]
        result |= {"flops": flops, "predicted_saved": 1 - flops[0] / flops[1]}
    else:
        num_bytes = []
        for engine, some in zip(engines, prompts, strict=True):
            counter = LoadCounter(engine.model_config)
            run_batch(engine, some.batch(work.batch_size, work.input_len, work.output_len), counter)
            num_bytes.append(mean_step_bytes(engine, counter.loads).total)
        result |= {
            "bytes_per_step": num_bytes,
            "roof_shares": [
                b / bandwidth / s for b, s in zip(num_bytes, (seconds, twin_seconds), strict=True)
            ],
            "predicted_saved": 1 - num_bytes[0] / num_bytes[1],
        }
    predicted = result["predicted_saved"]
    result["realised"] = result["saved"] / predicted if predicted >= LEAST_SAVING else None
    return result


def _prompt_flops(engine: Engine, num_tokens: int) -> float:
    """Of a prompt of words: each token sees half of it on average, and one needs the head."""
    config = engine.model_config
    cost = next(
        cost
        for cost in describe(config, context=num_tokens // 2).costs
        if cost.modality == Modality.TEXT.label
    )
    head = 2 * config.vocab_size * config.hidden_size
    return float(num_tokens * (cost.flops - head) + head)


# --- for people ------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    kv, room = report["kv"], report["held"]
    print_table(
        f"K/V of a request of {kv['num_tokens']} tokens; depth-routed layers took "
        f"{kv['depth_rate']:.1%}",
        ("KB per token", "of the twin", "share", "predicted", "deviation"),
        [
            (
                kv["bytes_per_token"] / 1e3,
                kv["twin_bytes_per_token"] / 1e3,
                f"{kv['share']:.1%}",
                f"{kv['predicted_share']:.1%}",
                f"{kv['deviation']:+.1%}",
            )
        ],
    )
    print_table(
        f"requests of {room['num_tokens']} tokens held in {room['kv_cache_bytes'] / 1e6:.4g} MB",
        ("depth-routed", "twin", "ratio"),
        [(room["requests"], room["twin_requests"], room["ratio"])],
    )
    print_table(
        "time, medians; decoding per step, prefill per prompt",
        (
            "work",
            "batch",
            "ms",
            "ms of the twin",
            "saved",
            "predicted",
            "realised",
            "roof",
            "twin's",
        ),
        [
            (
                one["name"],
                one["batch_size"],
                1e3 * one["seconds"],
                1e3 * one["twin_seconds"],
                f"{one['saved']:.1%}",
                f"{one['predicted_saved']:.1%}",
                "-" if one["realised"] is None else f"{one['realised']:.0%}",
                *(f"{share:.0%}" for share in one.get("roof_shares", ())),
                *("-" for _ in range(2 if one["is_prefill"] else 0)),
            )
            for one in report["times"]
        ],
    )
