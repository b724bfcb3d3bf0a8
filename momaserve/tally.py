"""What one step brought, counted while its results are settled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from momaserve.core.plan import StepPlan
from momaserve.core.scheduler import Scheduler
from momaserve.runner.routing_recorder import RoutingCounts
from momaserve.stats import StepStats


@dataclass(slots=True)
class Tally:
    """Counts of one step while its results are settled."""

    prompt_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    first_token_latencies_s: list[float] = field(default_factory=list)
    inter_token_latencies_s: list[float] = field(default_factory=list)

    def count(self, token_ids: Iterable[int], image_ids: range) -> None:
        for token in token_ids:
            if token in image_ids:
                self.image_tokens += 1
            else:
                self.text_tokens += 1

    def step_stats(
        self, plan: StepPlan, routing: RoutingCounts, scheduler: Scheduler, step_s: float
    ) -> StepStats:
        """The record of the step; `scheduler` has settled it already."""
        return StepStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_cache_usage=scheduler.kv_cache.usage,
            num_tokens=plan.num_tokens,
            prompt_tokens=self.prompt_tokens,
            generated_text_tokens=self.text_tokens,
            generated_image_tokens=self.image_tokens,
            images=self.images,
            num_preemptions=plan.num_preemptions,
            prefix_cache_queries=plan.num_cache_queries,
            prefix_cache_hits=plan.num_cache_hits,
            step_s=step_s,
            predicted_s=plan.predicted_s,
            first_token_latencies_s=tuple(self.first_token_latencies_s),
            inter_token_latencies_s=tuple(self.inter_token_latencies_s),
            expert_tokens=routing.expert_tokens,
            group_tokens=routing.group_tokens,
            experts_per_token=routing.experts_per_token,
            depth_tokens=routing.depth_tokens,
        )
