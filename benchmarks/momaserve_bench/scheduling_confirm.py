"""Some points of `bench scheduling` on the real engine, with random weights, on this machine."""

from __future__ import annotations

import argparse
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from momaserve.config import EngineConfig, SchedulerConfig, Scheduling
from momaserve.engine import Engine
from momaserve.errors import MomaserveError
from momaserve.loading import PRESET_SEED, ModelParts, choose_device, choose_dtype
from momaserve.models.presets import preset_config
from momaserve.models.random_weights import random_model
from momaserve.outputs import FinishReason
from momaserve.request import RequestStatus, Submission
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.tokens.grammar import GrammarSpec
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import Prompt
from momaserve_bench.engine_setup import with_image_tokens
from momaserve_bench.report import print_table
from momaserve_bench.scheduling_point import Point, Targets, choose_targets, measure
from momaserve_bench.scheduling_simulator import Outcome, Served
from momaserve_bench.scheduling_trace import Arrival, make_trace

NUM_VALUES = 2
"""Of slots and of loads: four points."""
_IDLE_S = 0.001


class StepFailedError(MomaserveError):
    """The engine could not answer a request of the benchmark."""


def scheduler_config(
    policy: Scheduling, num_slots: int, args: argparse.Namespace
) -> SchedulerConfig:
    """Limits that refuse no request of a run; raises ConfigError for settings out of range."""
    is_aware = policy is Scheduling.ROUTER_AWARE
    return SchedulerConfig(
        max_num_requests=num_slots,
        max_num_step_tokens=args.max_num_step_tokens,
        max_queued_requests=args.num_requests,
        max_queued_tokens=2 * args.num_requests * args.prompt_tokens,
        scheduling=policy,
        max_num_passes=args.max_num_passes if is_aware else None,
        step_time_target_ms=args.step_time_target_ms if is_aware else None,
    )


def confirm(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The first size with the first two numbers of slots at the first two loads.

    Raises:
        ConfigError: settings that cannot work.
    """
    config = with_image_tokens(preset_config(f"moma-{args.sizes[0]}-4t4i"), args.image_tokens)
    device = choose_device("auto")
    dtype = choose_dtype("auto", device, config)
    spec = GrammarSpec.from_config(config)
    parts = ModelParts(
        model=random_model(config, seed=PRESET_SEED, dtype=dtype, device=device),
        processor=Processor(spec),
        name=f"moma-{args.sizes[0]}-4t4i",
        dtype=dtype,
        device=device,
    )

    def trace(rate_per_s: float, seed: int) -> list[Arrival]:
        return make_trace(
            spec,
            num_requests=args.num_requests,
            prompt_tokens=args.prompt_tokens,
            rate_per_s=rate_per_s,
            seed=seed,
        )

    def targets(saturated: Outcome) -> Targets:
        return choose_targets(saturated, args.image_tokens, args.ttft_target_ms, args.itl_target_ms)

    found: list[tuple[int, Point]] = []
    for slots in args.slots[:NUM_VALUES]:

        def serve(
            policy: Scheduling, arrivals: Sequence[Arrival], num_slots: int = slots
        ) -> Outcome:
            config = EngineConfig(
                keep_weights=True,  # other engines follow
                scheduler=scheduler_config(policy, num_slots, args),
            )
            return serve_trace(Engine(parts, config), arrivals)

        serve(Scheduling.FCFS, trace(math.inf, args.seeds[0])[:slots])  # to warm up
        loads = args.loads[:NUM_VALUES]
        points = measure(serve, trace, targets, loads=loads, seeds=args.seeds[:1])
        found += [(slots, point) for point in points]
    print_table(
        f"The same on the real engine: {parts.name}, {dtype}, {device}",
        ("slots", "load", "tokens/s fcfs", "router-aware", "ratio", "passes", "error"),
        [
            (
                slots,
                point.load,
                point.fcfs[0].tokens_per_s,
                point.router_aware[0].tokens_per_s,
                f"{point.ratio('tokens_per_s'):.3f}",
                point.router_aware[0].most_passes,
                f"{point.router_aware[0].median_error:.3f}",
            )
            for slots, point in found
        ],
    )
    return [{"preset": parts.name, "slots": slots, **p.to_dict()} for slots, p in found]


def serve_trace(engine: Engine, arrivals: Sequence[Arrival]) -> Outcome:
    """Serves requests as they arrive, by the clock on the wall.

    Raises:
        StepFailedError: the engine could not compute a request.
    """
    served: dict[str, Served] = {}
    coming = deque(arrivals)
    num_steps = num_tokens = 0
    started = time.perf_counter()
    while coming or engine.has_work:
        now = time.perf_counter() - started
        while coming and coming[0].time_s <= now:
            arrival = coming.popleft()
            engine.add(_submission(engine, arrival))
            served[arrival.name] = Served(arrival_s=arrival.time_s)
        if not engine.has_work:
            time.sleep(min(_IDLE_S, coming[0].time_s - now))
            continue
        waiting = {
            name: request.num_passes
            for name, request in engine.scheduler.requests.items()
            if request.status is RequestStatus.WAITING
        }
        outputs = engine.step()
        num_steps += 1
        for name, num_passes in waiting.items():
            request = engine.scheduler.requests.get(name)
            if request is None or request.status is not RequestStatus.WAITING:
                served[name].start_s = now
                served[name].num_passes = num_passes if request is None else request.num_passes
        ended = time.perf_counter() - started
        for output in outputs:
            if output.finish_reason is FinishReason.ERROR:
                raise StepFailedError(output.error or "a step failed")
            num_tokens += 1
            served[output.request_id].token_times_s.append(ended)
    return Outcome(
        served=tuple(served.values()),
        end_s=time.perf_counter() - started,
        num_tokens=num_tokens,
        num_steps=num_steps,
        median_error=engine.step_timer.median_error or 0.0,
    )


def _submission(engine: Engine, arrival: Arrival) -> Submission:
    picture = engine.processor.spec.num_image_span_tokens
    params = SamplingParams(
        mode=OutputMode.IMAGE if arrival.draws else OutputMode.TEXT,
        max_tokens=picture if arrival.draws else arrival.num_text_tokens,
        ignore_eos=True,
        seed=0,
    )
    return engine.make_submission(Prompt(arrival.prompt_ids), params, arrival.name)
