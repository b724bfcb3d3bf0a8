"""Properties of any load that hypothesis makes up; the simulated engine asserts them.

The memory that a step reads holds what it must, token for token; answers are those of an
undisturbed run; ages, budgets and caps are kept; nothing starves; all blocks come back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from momaserve.config import Scheduling
from tests.core.simulated_engine import Limits, SimulatedEngine
from tests.core.slow_model import BEGIN, SALTS, TEXT, Submission

NUM_LOADS = 2000
MOST_STEPS = 1000


@dataclass(frozen=True)
class Abort:
    which: int


@dataclass(frozen=True)
class Steps:
    """Plans up to `depth` steps before any is settled, so many times."""

    count: int
    depth: int


@dataclass(frozen=True)
class Fail:
    """All steps in flight fail."""


Operation = Submission | Abort | Steps | Fail

limits = st.builds(
    Limits,
    num_blocks=st.integers(6, 20),
    block_size=st.sampled_from([2, 4, 1]),
    max_num_requests=st.integers(2, 6),
    max_num_step_tokens=st.integers(3, 16),
    max_queued_requests=st.integers(4, 8),
    max_queued_tokens=st.integers(20, 60),
)
aware_limits = st.builds(
    lambda limits, passes, target: replace(
        limits,
        scheduling=Scheduling.ROUTER_AWARE,
        max_num_passes=passes,
        step_time_target_ms=target,
    ),
    limits,
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([None, 1.0, 7e5]),
)
prompts = st.builds(
    lambda length, tail: ((TEXT[0],) * 12)[:length] + tail,
    st.integers(1, 10),
    st.sampled_from([(), (TEXT[1],), (TEXT[2], TEXT[2])]),
)
texts = st.builds(
    Submission,
    prompt=prompts,
    max_tokens=st.integers(0, 12),
    n=st.sampled_from([1, 1, 2, 3]),
    seed=st.integers(0, 2),
    salt=st.sampled_from([None, SALTS[1]]),
    priority=st.sampled_from([0, 0, 1, -1]),
    routing=st.sampled_from(["causal", "causal", "calibrated"]),
    prompt_routing=st.sampled_from(["causal", "calibrated", "expert_choice"]),
    has_bursts=st.sampled_from([False, False, True]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
)
pictures = st.builds(
    lambda num_codes, ends_with_begin, more, **rest: Submission(
        prompt=(TEXT[0], TEXT[0], BEGIN) if ends_with_begin else (TEXT[0], TEXT[0]),
        num_codes=num_codes,
        opens_picture=not ends_with_begin,
        max_tokens=num_codes + 2 + more,
        **rest,
    ),
    num_codes=st.integers(1, 6),
    ends_with_begin=st.booleans(),
    more=st.integers(0, 8),
    n=st.sampled_from([1, 1, 2]),
    seed=st.integers(0, 1),
    priority=st.sampled_from([0, 0, 1]),
    prompt_routing=st.sampled_from(["causal", "causal", "expert_choice"]),
    num_companions=st.sampled_from([1, 1, 2]),
)
steps = st.builds(Steps, st.integers(1, 6), st.integers(1, 3))
operations: st.SearchStrategy[Operation] = st.one_of(
    texts, steps, pictures, steps, st.builds(Abort, st.integers(0, 7)), st.just(Fail())
)


@settings(derandomize=True, deadline=None, max_examples=NUM_LOADS)
@given(limits=limits | aware_limits, load=st.lists(operations, min_size=2, max_size=12))
def test_any_load_is_served_right(limits: Limits, load: list[Operation]) -> None:
    engine = SimulatedEngine(limits)
    for operation in load:
        match operation:
            case Submission():
                engine.submit(operation)
            case Abort(which):
                if engine.names:
                    engine.abort(engine.names[which % len(engine.names)])
            case Steps(count, depth):
                for _ in range(count):
                    if engine.num_in_flight >= depth:
                        engine.settle()
                    engine.step()
            case Fail():
                engine.fail()
    engine.drain(MOST_STEPS)
