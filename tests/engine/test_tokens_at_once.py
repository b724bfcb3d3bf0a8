"""Outputs that are handed over several tokens at a time."""

from __future__ import annotations

import pytest

from momaserve.async_engine import AsyncEngine
from momaserve.engine import Engine
from momaserve.outputs import FinishReason, TokenLogprob, TokenOutput, TokenRouting
from momaserve.sampling import SamplingParams
from tests.engine.threaded import PROMPT, run, serving


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1] * 8), (3, [1, 3, 3, 1]), (100, [1, 7])])
def test_the_first_token_comes_alone_and_the_rest_so_many_at_a_time(
    engine: Engine, at_once: int, sizes: list[int]
) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1, logprobs=1)

    async def read(served: AsyncEngine, count: int) -> list[TokenOutput]:
        stream = await served.generate(PROMPT, params, tokens_at_once=count)
        return [item.output async for item in stream]

    async def main(served: AsyncEngine) -> None:
        single, several = await read(served, 1), await read(served, at_once)
        assert [len(output.token_ids) for output in several] == sizes
        whole, expected = TokenOutput.joined(several), TokenOutput.joined(single)
        assert (whole.token_ids, whole.logprobs) == (expected.token_ids, expected.logprobs)
        assert whole.logprobs is not None and len(whole.logprobs) == 8
        reasons = [output.finish_reason for output in several]
        assert reasons == [None] * (len(sizes) - 1) + [FinishReason.LENGTH]

    with serving(engine) as (served, _):
        run(main(served))


def test_joined_keeps_what_any_of_them_has() -> None:
    score, routing = TokenLogprob(5, -1.0), TokenRouting(5, "text", ((0,),))
    first = TokenOutput(request_id="r", token_ids=(5,), prompt_logprobs=(score,), logprobs=(score,))
    second = TokenOutput(
        request_id="r",
        token_ids=(6, 7),
        logprobs=(score, score),
        routing=(routing,),
        finish_reason=FinishReason.STOP,
        stop_token_id=2,
    )
    assert TokenOutput.joined([first, second]) == TokenOutput(
        request_id="r",
        token_ids=(5, 6, 7),
        prompt_logprobs=(score,),
        logprobs=(score,) * 3,
        routing=(routing,),
        finish_reason=FinishReason.STOP,
        stop_token_id=2,
    )
    assert TokenOutput.joined([first]) is first
