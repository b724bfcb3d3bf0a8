"""Long seeded random runs of the scheduler beside the slow model, compared after every step."""

from __future__ import annotations

import random

import pytest

from momaserve.core.plan import StepPlan
from momaserve.core.scheduler import Scheduler
from momaserve.errors import PromptError, QueueFullError, RequestError
from momaserve.request import Request
from tests.core.factory import make_request, make_scheduler
from tests.core.slow_model import KVMemory, SlowRequest, SlowScheduler

NUM_ARRIVALS = 4000


class Run:
    """One random run: arrivals, aborts and finishes, told to both schedulers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        limits = {
            "num_blocks": self.random.randint(3, 24),
            "block_size": self.random.choice([1, 2, 4, 8]),
            "max_num_requests": self.random.randint(1, 12),
            "max_num_step_tokens": self.random.randint(1, 24),
            "max_queued_requests": self.random.randint(3, 12),
            "max_queued_tokens": self.random.randint(20, 120),
        }
        self.fast: Scheduler = make_scheduler(**limits)
        self.slow = SlowScheduler(**limits)
        self.memory = KVMemory(limits["block_size"])
        self.num_arrivals = 0
        self.num_steps = 0
        self.num_refused = 0
        self.num_aborted_in_step = 0

    def arrive(self, request_id: str | None = None) -> None:
        """One to three choices that share a prompt arrive together, perhaps to be refused."""
        roll = self.random
        num_prompt = roll.randint(1, roll.choice([3, 12, 30]))
        opening = roll.choice([0, 0, 0, 1])
        max_tokens = opening + roll.randint(1, 16)
        whole = roll.random() < 0.2
        new: list[Request] = []
        for _ in range(1 if request_id else roll.choice([1, 1, 2, 3])):
            name = request_id or f"r{self.num_arrivals}"
            self.num_arrivals += 1
            forced = [1] * opening
            new.append(
                make_request(name, num_prompt, max_tokens=max_tokens, whole=whole, forced=forced)
            )
        slow = [
            SlowRequest(r.request_id, num_prompt, r.num_tokens, r.max_num_tokens, whole)
            for r in new
        ]
        never = self.slow.blocks(num_prompt + max_tokens) > self.slow.num_blocks or (
            whole and num_prompt > self.slow.max_num_step_tokens
        )
        too_many = len(new) * num_prompt > self.slow.max_queued_tokens
        error = PromptError if never else RequestError if too_many else QueueFullError
        if never or too_many or not self.slow.has_room_for(slow):
            with pytest.raises(error):
                self.fast.add_all(new)
            self.num_refused += 1
        else:
            self.fast.add_all(new)
            self.slow.requests += slow

    def abort_some(self, *, again: bool) -> None:
        """Aborts one request of any state or none; perhaps its id is used again at once."""
        if not self.slow.requests or self.random.random() > 0.15:
            assert not self.fast.abort("nobody")
            return
        victim = self.random.choice(self.slow.requests)
        self.slow.requests.remove(victim)
        assert self.fast.abort(victim.request_id)
        assert not self.fast.abort(victim.request_id)
        if again and self.random.random() < 0.3:
            self.arrive(victim.request_id)
        self.num_aborted_in_step += again

    def step(self) -> None:
        plan = self.fast.schedule()
        rows = [(r.request_id, r.start, r.num_new_tokens, r.samples) for r in plan.requests]
        assert rows == self.slow.schedule()
        assert bool(rows) == self.fast.has_work
        self.fast.check()
        owners: dict[str, object] = {name: self.fast.requests[name] for name, *_ in rows}
        self.memory.run(plan, owners)
        stepped = {name: self.slow.get(name) for name, *_ in rows}
        self.abort_some(again=True)
        self.settle(plan, stepped)
        self.compare()
        self.num_steps += 1

    def settle(self, plan: StepPlan, stepped: dict[str, SlowRequest | None]) -> None:
        sampled: dict[str, list[int]] = {}
        finished: list[str] = []
        for planned in plan.requests:
            request = stepped[planned.request_id]
            assert request is not None
            request.num_computed += planned.num_new_tokens
            if not planned.samples:
                continue
            room = request.max_num_tokens - request.num_tokens
            num_sampled = min(room, self.random.choice([1, 1, 1, 2]))
            sampled[planned.request_id] = [7] * num_sampled
            request.num_tokens += num_sampled
            if num_sampled == room or self.random.random() < 0.08:
                finished.append(planned.request_id)
                if request in self.slow.requests:
                    self.slow.requests.remove(request)
        self.fast.update(plan, sampled, finished)

    def compare(self) -> None:
        self.fast.check()
        fast = {
            r.request_id: (r.num_computed_tokens, r.num_tokens, r.status == "running")
            for r in self.fast.requests.values()
        }
        assert fast == {
            r.request_id: (r.num_computed, r.num_tokens, r.running) for r in self.slow.requests
        }
        waiting = self.slow.waiting()
        assert self.fast.num_waiting == len(waiting)
        assert self.fast.num_waiting_tokens == sum(r.num_prompt for r in waiting)
        assert self.fast.num_running == len(self.slow.running())
        cache = self.fast.kv_cache
        assert cache.num_blocks - cache.num_free_blocks == self.slow.num_used_blocks()


@pytest.mark.parametrize("seed", range(8))
def test_random_run_agrees_with_the_slow_model(seed: int) -> None:
    run = Run(seed)
    while run.num_arrivals < NUM_ARRIVALS:
        for _ in range(run.random.choice([0, 0, 1, 1, 2])):
            run.arrive()
        run.abort_some(again=False)
        run.compare()
        run.step()
    while run.fast.has_work:
        run.step()
    assert run.num_steps > 1000
    assert run.num_refused > 0 and run.num_aborted_in_step > 0
    assert run.fast.kv_cache.num_free_blocks == run.fast.kv_cache.num_blocks
    assert run.fast.kv_cache.usage == 0.0
    assert run.slow.requests == []
