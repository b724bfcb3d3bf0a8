"""Long seeded random runs with everything mixed, checked by content after every step."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from momaserve.config import Scheduling
from tests.core.simulated_engine import Limits, SimulatedEngine
from tests.core.slow_model import BEGIN, CODES, END, SALTS, TEXT, Submission

NUM_SEEDS = 900
NUM_SEEDS_PER_TEST = 150
NUM_OPERATIONS = 60
MOST_STEPS = 2000
"""Far more than any of these runs needs to end."""


def random_limits(dice: random.Random, scheduling: Scheduling, is_routed: bool) -> Limits:
    is_aware = scheduling is Scheduling.ROUTER_AWARE
    num_requests = dice.randint(2, 10)
    if is_aware and dice.random() < 0.7:  # a backlog is counted by slots
        num_requests = dice.randint(2, 3)
    block_size = dice.choice([1, 2, 4, 8])
    num_routed = dice.randint(1, 4) if is_routed else 0
    entries_per_block = block_size * dice.randint(1, 4)
    num_tokens = dice.randint(22, 52)
    num_blocks = num_tokens // block_size + num_tokens * num_routed // entries_per_block
    return Limits(
        num_routed=num_routed,
        entries_per_block=entries_per_block,
        num_blocks=num_blocks + dice.randint(1, 4),
        block_size=block_size,
        max_num_requests=num_requests,
        max_num_step_tokens=dice.choice([4, 5, 6, 8, 12, 24]),
        max_queued_requests=dice.randint(4, 12),
        max_queued_tokens=dice.randint(40, 150),
        prefix_caching=dice.random() < 0.9,
        scheduling=scheduling,
        max_num_passes=dice.choice([None, 0, 1, 3]) if is_aware else None,
        # From less than any step takes to more than most do.
        step_time_target_ms=dice.choice([None, 1.0, 6e5, 1e6]) if is_aware else None,
    )


def random_prompt(dice: random.Random) -> tuple[int, ...]:
    """Most prompts begin like others, and like answers."""
    picture = (BEGIN, *(CODES[0],) * 3, END)
    opening = dice.choice([(TEXT[0],) * 20, (TEXT[1],) * 9 + (TEXT[2],) * 9, picture * 3])
    tail = [dice.choice(TEXT) for _ in range(dice.choice([0, 1, 3]))]
    length = dice.choice([1, 1, 2, 5, 8, 15])
    marks = [token for token in opening[:length] if token in (BEGIN, END)]
    if marks and marks[-1] == BEGIN:
        tail.insert(0, END)  # a picture that is cut off would be drawn to its end
    return (*opening[:length], *tail)


def random_submission(dice: random.Random) -> Submission:
    prompt = random_prompt(dice)
    is_guided = dice.random() < 0.35
    num_codes = dice.randint(1, 8) if is_guided or dice.random() < 0.2 else 0
    start = dice.random() if num_codes else 1.0
    if start < 0.3:
        prompt = (*prompt, BEGIN)
    opens_picture = 0.3 <= start < 0.6
    fewest = num_codes + 1 + opens_picture
    prompt_routing = dice.choice(["causal", "causal", "calibrated", "expert_choice"])
    return Submission(
        prompt=prompt,
        max_tokens=fewest + dice.choice([0, 3, 12, 24]),
        n=dice.choice([1, 1, 2, 2, 4]),
        seed=dice.randint(0, 3),
        salt=dice.choice([None, None, *SALTS]),
        priority=dice.choice([0, 0, 1, 2, -1]),
        routing=dice.choice(["causal", "causal", "calibrated"]),
        prompt_routing=prompt_routing,
        num_companions=dice.choice([1, 1, 2]) if is_guided else 0,
        num_codes=num_codes,
        opens_picture=opens_picture,
        has_bursts=not num_codes and dice.random() < 0.2,
        prompt_logprobs=dice.choice([None, None, None, None, 0]),
    )


def run(seed: int, scheduling: Scheduling, is_routed: bool) -> Counter[str]:
    """One load from its first arrival to an empty engine; returns what happened in it."""
    dice = random.Random(seed)
    engine = SimulatedEngine(random_limits(dice, scheduling, is_routed))
    depth = dice.choice([1, 2, 2, 3])
    fails = dice.random() < 0.3
    arrivals = dice.choice([0.1, 0.2, 0.3])
    for _ in range(NUM_OPERATIONS):
        roll = dice.random()
        if roll < arrivals:
            engine.submit(random_submission(dice))
        elif roll < arrivals + 0.04 and engine.names:
            name = dice.choice(engine.names)
            engine.abort(name)
            if dice.random() < 0.3:  # its id is used again at once
                engine.submit(random_submission(dice), [name])
        elif roll < arrivals + 0.06 and fails and engine.num_in_flight:
            engine.fail()
        elif engine.num_in_flight == depth or roll < arrivals + 0.3 and engine.num_in_flight:
            engine.settle()
        else:
            engine.step()
    engine.drain(MOST_STEPS)
    return engine.seen


@pytest.mark.parametrize("is_routed", [False, True], ids=["plain", "depth_routed"])
@pytest.mark.parametrize("scheduling", Scheduling)
@pytest.mark.parametrize("first", range(0, NUM_SEEDS, NUM_SEEDS_PER_TEST))
def test_memory_and_answers_are_right_under_any_load(
    first: int, scheduling: Scheduling, is_routed: bool
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(first, first + NUM_SEEDS_PER_TEST):
        try:
            seen += run(seed, scheduling, is_routed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    for event in (
        "finished after preemptions",
        "aborted in flight",
        "preempted in flight",
        "steps ahead",
        "copies",
        "forks",
        "hits",
        "companion rows",
        "failed steps",
        "refused: PromptError",
        "refused: RequestError",
        "refused: QueueFullError",
    ):
        assert seen[event] >= 5, f"{event} is too rare: {seen}"
    assert (seen["entries"] >= 1000) == is_routed, seen
    assert (seen["passed"] >= 5) == (scheduling is Scheduling.ROUTER_AWARE), seen
