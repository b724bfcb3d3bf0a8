"""Builds schedulers and requests for tests, and plays the engine's part in a step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence

from momaserve.config import RoutingPolicy, SchedulerConfig, Scheduling
from momaserve.core.block_key import root_key
from momaserve.core.cost_model import CostModel, MachineRates
from momaserve.core.forecast import Forecast
from momaserve.core.load import LoadMeter
from momaserve.core.model_costs import GroupCosts, LayerCosts, ModelCosts
from momaserve.core.plan import StepPlan
from momaserve.core.scheduler import Scheduler
from momaserve.modality import Modality
from momaserve.request import Request, TokenSequence
from momaserve.sampling import SamplingParams

COMPANION_PROMPT = (1, 2)
"""What guidance puts before a picture: two tokens."""

IMAGE_IDS = range(20, 22)
BEGIN_IMAGE = 101
"""As in `tests.core.slow_model`."""
FOUR_AND_FOUR = ((Modality.TEXT,), (Modality.IMAGE,))
ONE_GROUP = ((Modality.TEXT, Modality.IMAGE),)


def make_costs(
    modalities: Sequence[tuple[Modality, ...]] = FOUR_AND_FOUR, *, num_experts: int = 4
) -> ModelCosts:
    """Two layers; an expert is 100 bytes, attention 40 and the head 60."""
    return ModelCosts(
        groups=tuple(
            GroupCosts(
                modalities=served,
                rates=(1 / num_experts,) * num_experts,
                expert_bytes=100,
                pair_flops=50,
            )
            for served in modalities
        ),
        layers=(LayerCosts(num_layers=2, shares=(1.0, 1.0)),),
        dense_bytes=40,
        dense_flops=20,
        head_bytes=60,
        head_flops=30,
        kv_bytes=2,
        visible_flops=1,
    )


def make_forecast(
    modalities: Sequence[tuple[Modality, ...]] = FOUR_AND_FOUR, *, fixed_s: float = 0.0
) -> Forecast:
    """A byte takes a second, and so do a thousand operations."""
    rates = MachineRates(bytes_per_s=1.0, flops_per_s=1000.0, fixed_s=fixed_s)
    return Forecast(CostModel(make_costs(modalities), rates), LoadMeter(IMAGE_IDS, BEGIN_IMAGE))


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_requests: int = 8,
    max_num_step_tokens: int = 16,
    max_queued_requests: int = 64,
    max_queued_tokens: int = 4096,
    prefix_caching: bool = True,
    max_num_passes: int | None = None,
    step_time_target_ms: float | None = None,
    scheduling: Scheduling = Scheduling.ROUTER_AWARE,
    forecast: Forecast | None = None,
) -> Scheduler:
    config = SchedulerConfig(
        max_num_requests=max_num_requests,
        max_num_step_tokens=max_num_step_tokens,
        max_queued_requests=max_queued_requests,
        max_queued_tokens=max_queued_tokens,
        scheduling=scheduling,
        max_num_passes=max_num_passes,
        step_time_target_ms=step_time_target_ms,
    )
    return Scheduler(
        config,
        num_blocks=num_blocks,
        block_size=block_size,
        prefix_caching=prefix_caching,
        forecast=forecast,
    )


def make_sequence(
    token_ids: Sequence[int],
    *,
    num_prompt: int | None = None,
    salt: str | None = None,
    shared: bool = True,
    routing: RoutingPolicy = RoutingPolicy.CAUSAL,
    prompt_routing: RoutingPolicy = RoutingPolicy.CAUSAL,
) -> TokenSequence:
    """All tokens are prompt unless told; a sequence that is not `shared` has no root key."""
    return TokenSequence(
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids) if num_prompt is None else num_prompt,
        routing=routing,
        prompt_routing=prompt_routing,
        root_key=root_key(salt) if shared else None,
    )


def make_companion(salt: str | None = None) -> TokenSequence:
    return make_sequence(COMPANION_PROMPT, salt=salt)


def make_request(
    request_id: str,
    prompt: Sequence[int] | int = 4,
    *,
    max_tokens: int = 8,
    whole: bool = False,
    forced: Sequence[int] = (),
    salt: str | None = None,
    priority: int = 0,
    leader: str | None = None,
    prompt_logprobs: int | None = None,
    num_companions: int = 0,
    num_codes: int = 4,
    in_picture: bool = False,
) -> Request:
    """`prompt` is token ids, or how many: those are no other request's tokens.

    `whole` routes the prompt by expert choice, `forced` opens the output, and a request that is
    `in_picture` comes with its companions.
    """
    if isinstance(prompt, int):
        first = 1000 * (1 + zlib.crc32(request_id.encode()) % 10**6)
        prompt = range(first, first + prompt)
    sequence = make_sequence(
        [*prompt, *forced],
        num_prompt=len(prompt),
        salt=salt,
        shared=not whole,
        prompt_routing=RoutingPolicy.EXPERT_CHOICE if whole else RoutingPolicy.CAUSAL,
    )
    return Request(
        request_id=request_id,
        sequence=sequence,
        params=SamplingParams(
            max_tokens=max_tokens,
            priority=priority,
            cache_salt=salt,
            prompt_logprobs=prompt_logprobs,
        ),
        seed=0,
        max_num_tokens=len(prompt) + max_tokens,
        max_num_companion_tokens=len(COMPANION_PROMPT) + num_codes if num_companions else 0,
        num_companions=num_companions,
        companions=[make_companion(salt) for _ in range(num_companions if in_picture else 0)],
        leader_id=leader,
    )


def make_samples(
    names: str,
    prompt: Sequence[int] | int = 4,
    *,
    max_tokens: int = 8,
    whole: bool = False,
    prompt_logprobs: int | None = None,
    num_companions: int = 0,
    in_picture: bool = False,
) -> list[Request]:
    """One request per letter, all with the prompt of the first, which leads them."""
    if isinstance(prompt, int):
        prompt = make_request(names[0], prompt).prompt_token_ids
    return [
        make_request(
            name,
            prompt,
            max_tokens=max_tokens,
            whole=whole,
            prompt_logprobs=prompt_logprobs,
            num_companions=num_companions,
            in_picture=in_picture,
            leader=None if name == names[0] else names[0],
        )
        for name in names
    ]


def settle(
    scheduler: Scheduler,
    plan: StepPlan,
    *,
    sampled: Mapping[str, Sequence[int]] | None = None,
    finished: Collection[str] = (),
) -> None:
    """`update` with `check` after it; a request that samples gets token 7 unless told, and its
    companions get what it gets."""
    tokens: dict[str, Sequence[int]] = {**dict.fromkeys(plan.samples, (7,)), **(sampled or {})}
    for name in plan.samples:
        request = scheduler.requests.get(name)
        for companion in request.companions if request else ():
            companion.token_ids += tokens[name]
    scheduler.update(plan, tokens, finished)
    scheduler.check()


def run_step(
    scheduler: Scheduler,
    *,
    sampled: Mapping[str, Sequence[int]] | None = None,
    finished: Collection[str] = (),
) -> StepPlan:
    """One step, planned and settled, with `check` around it."""
    plan = scheduler.schedule()
    scheduler.check()
    settle(scheduler, plan, sampled=sampled, finished=finished)
    return plan


def run_until(scheduler: Scheduler, is_reached: Callable[[], object]) -> StepPlan:
    """Steps until something has come true; returns the plan of the last one."""
    for _ in range(100):
        plan = run_step(scheduler)
        if is_reached():
            return plan
    raise AssertionError("it never comes true")


def spans(plan: StepPlan) -> list[tuple[str, int, int, int]]:
    """(request, companion, start, new tokens) of each row of a step."""
    return [(s.request_id, s.companion, s.start, s.num_new_tokens) for s in plan.sequences]
