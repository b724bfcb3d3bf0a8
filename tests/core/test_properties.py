"""Properties that hold for any load: hypothesis looks for one that breaks them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from momaserve.core.block_pool import BlockPool
from momaserve.core.kv_cache import KVCache
from momaserve.request import Request
from tests.core.factory import make_request, make_scheduler

# Derandomised: a run of the tests is the same everywhere, as the house rules ask.
SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocating and freeing keeps every block accounted for."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.tables: list[list[int]] = []

    @rule(target=held, num_blocks=st.integers(0, 13))
    def allocate(self, num_blocks: int) -> object:
        num_free = self.pool.num_free
        blocks = self.pool.allocate(num_blocks)
        assert (blocks is None) == (num_blocks > num_free)
        if blocks is None:
            assert self.pool.num_free == num_free
            return multiple()
        assert len(blocks) == num_blocks
        self.tables.append(blocks)
        return blocks

    @rule(blocks=consumes(held))
    def free(self, blocks: list[int]) -> None:
        self.tables = [table for table in self.tables if table is not blocks]
        self.pool.free(reversed(blocks))

    @invariant()
    def account(self) -> None:
        self.pool.check(self.tables)


class CacheMachine(RuleBasedStateMachine):
    """Whoever was admitted can grow to its reservation, whatever the others do."""

    admitted = Bundle("admitted")

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(num_blocks=10, block_size=4)
        self.max_num_tokens: dict[str, int] = {}
        self.num_admitted = 0

    @rule(target=admitted, max_num_tokens=st.integers(0, 48))
    def admit(self, max_num_tokens: int) -> object:
        reserved = sum(-(-size // 4) for size in self.max_num_tokens.values())
        fits = reserved + -(-max_num_tokens // 4) <= 10
        assert self.cache.can_admit(max_num_tokens) == fits
        if not fits:
            return multiple()
        name = f"r{self.num_admitted}"
        self.num_admitted += 1
        self.cache.admit(name, max_num_tokens)
        self.max_num_tokens[name] = max_num_tokens
        return name

    @rule(name=admitted, share=st.floats(0, 1))
    def grow(self, name: str, share: float) -> None:
        num_tokens = int(self.max_num_tokens[name] * share)
        before = self.cache.block_ids(name)
        self.cache.grow(name, num_tokens)
        after = self.cache.block_ids(name)
        assert after[: len(before)] == before
        assert len(after) == max(len(before), -(-num_tokens // 4))

    @rule(name=consumes(admitted))
    def free(self, name: str) -> None:
        del self.max_num_tokens[name]
        self.cache.free(name)

    @invariant()
    def account(self) -> None:
        self.cache.check()
        used = sum(len(self.cache.block_ids(name)) for name in self.max_num_tokens)
        assert self.cache.usage == 1 - self.cache.num_free_blocks / 10
        assert used == 10 - self.cache.num_free_blocks


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = SETTINGS
TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = SETTINGS

LOADS = st.lists(
    st.tuples(
        st.integers(1, 20),  # prompt
        st.integers(1, 10),  # output
        st.booleans(),  # whole prompt
        st.integers(0, 12),  # step before which it arrives
    ),
    min_size=1,
    max_size=12,
)


@SETTINGS
@given(
    load=LOADS, num_requests=st.integers(1, 6), budget=st.integers(1, 24), spare=st.integers(0, 9)
)
def test_every_load_ends_with_each_position_computed_once_and_in_order(
    load: list[tuple[int, int, bool, int]], num_requests: int, budget: int, spare: int
) -> None:
    block_size = 4
    scheduler = make_scheduler(
        num_blocks=8 + spare,  # 30 tokens, the longest request, take 8
        block_size=block_size,
        max_num_requests=num_requests,
        max_num_step_tokens=budget,
    )
    arrivals: list[tuple[int, Request]] = []
    for index, (num_prompt, num_output, whole, step) in enumerate(load):
        whole = whole and num_prompt <= budget
        request = make_request(f"r{index}", num_prompt, max_tokens=num_output, whole=whole)
        arrivals.append((step, request))
    computed: dict[str, list[int]] = {request.request_id: [] for _, request in arrivals}
    admitted: list[str] = []
    added: list[str] = []

    step = 0
    while scheduler.has_work or len(added) < len(arrivals):
        for when, request in arrivals:
            if when == step:
                scheduler.add(request)
                added.append(request.request_id)
        running = [r.request_id for r in scheduler.requests.values() if r.status == "running"]
        plan = scheduler.schedule()

        assert plan.num_tokens <= budget
        assert bool(plan.requests) == scheduler.has_work
        assert set(running) <= set(plan.num_new_tokens), "a running request stood still"
        sampled: dict[str, list[int]] = {}
        finished = set()
        for planned in plan.requests:
            request = scheduler.requests[planned.request_id]
            stop = planned.start + planned.num_new_tokens
            assert len(planned.block_ids) * block_size >= stop
            assert planned.samples == (stop == request.num_tokens)
            if planned.start == 0:
                admitted.append(planned.request_id)
                if request.prompt_routing == "expert_choice":
                    assert stop >= request.num_prompt_tokens
            computed[planned.request_id] += range(planned.start, stop)
            if planned.samples:
                sampled[planned.request_id] = [7]
                if request.num_tokens + 1 == request.max_num_tokens:
                    finished.add(planned.request_id)
        scheduler.update(plan, sampled, finished)
        scheduler.check()
        step += 1
        assert step < 1000, "livelock"

    assert admitted == added, "not first come, first served"
    for _, request in arrivals:
        assert len(request.output_token_ids) == request.params.max_tokens
        assert computed[request.request_id] == list(range(request.max_num_tokens - 1))
    assert scheduler.kv_cache.num_free_blocks == scheduler.kv_cache.num_blocks
