"""Runs the real scheduler against a clock that the cost model moves: no model, no device.

The time of a step is what a second cost model with the machine's true rates says, times noise.
The scheduler's own starts from rates that may be wrong, and learns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from momaserve.config import RoutingPolicy, SchedulerConfig
from momaserve.core.cost_model import CostModel, MachineRates
from momaserve.core.forecast import Forecast
from momaserve.core.load import LoadMeter
from momaserve.core.model_costs import ModelCosts
from momaserve.core.plan import StepPlan
from momaserve.core.scheduler import Scheduler
from momaserve.request import Request, TokenSequence
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.tokens.grammar import Grammar, GrammarSpec, GrammarState
from momaserve_bench.scheduling_trace import Arrival, is_word

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What steps really cost, and how wrong the scheduler is about it at first."""

    rates: MachineRates
    noise: float = 0.0
    """Standard deviation of the logarithm of a step's time."""
    belief: float = 1.0
    """What the scheduler takes the bandwidth for, over what it is."""


@dataclass(slots=True, kw_only=True)
class Served:
    """What became of one request; times in seconds since the run began."""

    arrival_s: float
    token_times_s: list[float] = field(default_factory=list)
    start_s: float = 0.0
    num_passes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run: every request's times, and how well steps were predicted."""

    served: tuple[Served, ...]
    end_s: float
    num_tokens: int
    num_steps: int
    median_error: float
    """Median of |predicted - real| / real over all steps."""

    @property
    def tokens_per_s(self) -> float:
        """Over the whole run, its end included, when slots run empty."""
        return self.num_tokens / self.end_s

    @property
    def requests_per_s(self) -> float:
        return len(self.served) / self.end_s


@dataclass(slots=True)
class _Player:
    """A request and the grammar's view of its answer."""

    arrival: Arrival
    request: Request
    state: GrammarState
    served: Served


class Simulation:
    """A scheduler, a simulated device and a clock."""

    def __init__(
        self,
        costs: ModelCosts,
        spec: GrammarSpec,
        machine: Machine,
        config: SchedulerConfig,
        *,
        seed: int,
    ) -> None:
        believed = MachineRates(
            bytes_per_s=machine.rates.bytes_per_s * machine.belief,
            flops_per_s=machine.rates.flops_per_s,
            fixed_s=machine.rates.fixed_s,
        )
        self._truth = CostModel(costs, machine.rates)
        self._noise = machine.noise
        self._cost_model = CostModel(costs, believed)
        self._config = config
        self._grammar = Grammar(spec)
        self._dice = random.Random(seed)
        self._words = [i for i in range(spec.vocab_size) if is_word(spec, i)]
        self._meter = LoadMeter(spec.image_ids, spec.begin_image)
        self._players: dict[str, _Player] = {}
        self._now = 0.0

    def run(self, trace: Sequence[Arrival]) -> Outcome:
        """Serves a trace to its end."""
        longest = max(len(a.prompt_ids) for a in trace) + 2 * self._longest_answer(trace)
        scheduler = Scheduler(
            self._config,
            num_blocks=self._config.max_num_requests * -(-longest // _BLOCK_SIZE) + 1,
            block_size=_BLOCK_SIZE,
            prefix_caching=False,  # no prompts begin alike
            forecast=Forecast(self._cost_model, self._meter),
        )
        all_served: list[Served] = []
        coming = iter(trace)
        arrival = next(coming, None)
        num_steps = num_tokens = 0
        while arrival is not None or scheduler.has_work:
            if arrival is not None and not scheduler.has_work:
                self._now = max(self._now, arrival.time_s)
            while arrival is not None and arrival.time_s <= self._now:
                player = self._make_player(arrival)
                self._players[arrival.name] = player
                all_served.append(player.served)
                scheduler.add_all([player.request])
                arrival = next(coming, None)
            plan = scheduler.schedule()
            num_steps += 1
            self._note_starts(plan)
            self._run_step(plan)
            num_tokens += len(plan.samples)
            sampled: dict[str, list[int]] = {}
            finished: list[str] = []
            for name in plan.samples:
                sampled[name], is_over = self._sample(self._players[name])
                if is_over:
                    finished.append(name)
            scheduler.update(plan, sampled, finished)
            for name in finished:
                del self._players[name]
        return Outcome(
            served=tuple(all_served),
            end_s=self._now,
            num_tokens=num_tokens,
            num_steps=num_steps,
            median_error=self._cost_model.median_error or 0.0,
        )

    def _longest_answer(self, trace: Sequence[Arrival]) -> int:
        longest = max(a.num_text_tokens for a in trace)
        return max(longest, self._grammar.spec.num_image_span_tokens)

    def _make_player(self, arrival: Arrival) -> _Player:
        spec, grammar = self._grammar.spec, self._grammar
        mode = OutputMode.IMAGE if arrival.draws else OutputMode.TEXT
        state = grammar.scan(arrival.prompt_ids)
        opening = grammar.opening(state, mode)
        for token in opening:
            state = grammar.advance(state, token, mode).state
        length = spec.num_image_span_tokens if arrival.draws else arrival.num_text_tokens
        request = Request(
            request_id=arrival.name,
            sequence=TokenSequence(
                token_ids=[*arrival.prompt_ids, *opening],
                num_prompt_tokens=len(arrival.prompt_ids),
                routing=RoutingPolicy.CAUSAL,
                prompt_routing=RoutingPolicy.CAUSAL,
            ),
            params=SamplingParams(mode=mode, max_tokens=length),
            seed=0,
            max_num_tokens=len(arrival.prompt_ids) + length,
        )
        return _Player(arrival, request, state, Served(arrival_s=arrival.time_s))

    def _note_starts(self, plan: StepPlan) -> None:
        for row in plan.sequences:
            if row.start == 0:
                player = self._players[row.request_id]
                player.served.start_s = self._now
                player.served.num_passes = player.request.num_passes

    def _run_step(self, plan: StepPlan) -> None:
        """Moves the clock, and tells the scheduler's cost model what it took."""
        assert plan.load is not None
        assert plan.predicted_s is not None
        noise = math.exp(self._dice.gauss(0.0, self._noise)) if self._noise else 1.0
        seconds = self._truth.predict(plan.load) * noise
        self._now += seconds
        self._cost_model.observe(plan.load, seconds, plan.predicted_s)

    def _sample(self, player: _Player) -> tuple[list[int], bool]:
        """New tokens of a request, and whether it is over."""
        request, grammar = player.request, self._grammar
        is_picture = player.state.image_tokens is not None
        token = self._dice.choice(grammar.spec.image_ids if is_picture else self._words)
        advance = grammar.advance(player.state, token, request.params.mode)
        player.state = advance.state
        player.served.token_times_s.append(self._now)
        new_tokens = [token, *advance.forced]
        is_full = request.num_tokens + len(new_tokens) >= request.max_num_tokens
        return new_tokens, advance.finished or is_full
