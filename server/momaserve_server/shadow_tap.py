"""Hands the tokens of picked answers to shadow evaluation when they have ended well."""

from __future__ import annotations

from collections.abc import Sequence

from momaserve.async_engine import AsyncEngine
from momaserve.config import EngineConfig
from momaserve.router_lab.shadow.sample import Sample
from momaserve.router_lab.shadow.shadow_eval import ShadowEval
from momaserve.sampling import SamplingParams
from momaserve.tokens.prompt import Prompt
from momaserve_server.settings import ServerSettings


def shadow_eval_of(settings: ServerSettings, async_engine: AsyncEngine) -> ShadowEval | None:
    """What `--shadow-eval` asks for; None where it is off.

    Raises:
        ConfigError: the model has no routers to compare.
    """
    if settings.shadow_eval == 0:
        return None
    engine = async_engine.engine
    return ShadowEval(
        engine.model,
        rate=settings.shadow_eval,
        policy=engine.config.routing,
        max_model_len=engine.max_model_len,
        is_busy=lambda: not async_engine.is_idle,
        is_stopping=lambda: async_engine.is_draining,
    )


class ShadowTap:
    """Collects the tokens of one HTTP request's choices, of those that are picked alone.

    What is aborted or fails never gets to `is_last`, and goes with this object.
    """

    def __init__(
        self,
        shadow_eval: ShadowEval,
        engine: EngineConfig,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_id: str,
    ) -> None:
        self._shadow_eval = shadow_eval
        self._routing = params.routing or engine.routing
        self._prompt_routing = params.prompt_routing or engine.prompt_routing or self._routing
        self._prompts = prompts
        self._n = params.n
        self._answers: dict[int, list[int]] = {
            index: []
            for index in range(len(prompts) * params.n)
            if shadow_eval.picks(f"{request_id}/{index}")
        }

    def push(self, index: int, token_ids: Sequence[int], *, is_last: bool) -> None:
        """New tokens of a choice, which ends well with them if `is_last`."""
        if index not in self._answers:
            return
        self._answers[index] += token_ids
        if is_last:
            prompt = self._prompts[index // self._n].token_ids
            answer = self._answers.pop(index)
            sample = Sample.of(prompt, answer, self._routing, self._prompt_routing)
            self._shadow_eval.offer(sample)
