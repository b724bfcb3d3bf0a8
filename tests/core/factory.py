"""Builds schedulers and requests for tests, and plays the engine's part in a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from momaserve.config import RoutingPolicy, SchedulerConfig
from momaserve.core.plan import StepPlan
from momaserve.core.scheduler import Scheduler
from momaserve.request import Request
from momaserve.sampling import SamplingParams


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_requests: int = 8,
    max_num_step_tokens: int = 16,
    max_queued_requests: int = 64,
    max_queued_tokens: int = 4096,
) -> Scheduler:
    config = SchedulerConfig(
        max_num_requests=max_num_requests,
        max_num_step_tokens=max_num_step_tokens,
        max_queued_requests=max_queued_requests,
        max_queued_tokens=max_queued_tokens,
    )
    return Scheduler(config, num_blocks=num_blocks, block_size=block_size)


def make_request(
    request_id: str,
    prompt: Sequence[int] | int = 4,
    *,
    max_tokens: int = 8,
    whole: bool = False,
    forced: Sequence[int] = (),
) -> Request:
    """`prompt` is token ids or their number; `whole` routes it by expert choice."""
    token_ids = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    return Request(
        request_id=request_id,
        prompt_token_ids=token_ids,
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        routing=RoutingPolicy.CAUSAL,
        prompt_routing=RoutingPolicy.EXPERT_CHOICE if whole else RoutingPolicy.CAUSAL,
        max_num_tokens=len(token_ids) + max_tokens,
        output_token_ids=list(forced),
    )


def run_step(
    scheduler: Scheduler,
    *,
    sampled: Mapping[str, Sequence[int]] | None = None,
    finished: Collection[str] = (),
) -> StepPlan:
    """One step with `check` around it; a request that samples gets token 7 unless told."""
    plan = scheduler.schedule()
    scheduler.check()
    tokens = {r.request_id: (7,) for r in plan.requests if r.samples}
    scheduler.update(plan, {**tokens, **(sampled or {})}, finished)
    scheduler.check()
    return plan
