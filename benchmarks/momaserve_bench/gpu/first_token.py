"""A preset on the GPU until its first token; imports all that an engine needs."""

from __future__ import annotations

import time
from collections.abc import Callable

from momaserve.config import EngineConfig
from momaserve.engine import Engine
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.tokens.prompt import Prompt

_PROMPT_LEN = 32
CONFIG = EngineConfig(device="cuda", backend="triton")


def first_token(
    preset: str, started: float, load: Callable[[str, EngineConfig], Engine] = Engine.load
) -> dict[str, float]:
    """Seconds since `started`, on the monotonic clock: until the engine was there, its first
    token, and a second one.

    Raises:
        RuntimeError: the engine could not compute the request.
    """
    engine = load(preset, CONFIG)
    loaded_s = time.monotonic() - started
    params = SamplingParams(mode=OutputMode.TEXT, max_tokens=2, ignore_eos=True, seed=0)
    last = engine.model_config.vocab_size - 1
    prompt = Prompt((last,) * _PROMPT_LEN)  # words have the highest ids
    engine.add(engine.make_submission(prompt, params, "first"))
    times: list[float] = []
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(output.error)
            times += [time.monotonic() - started] * len(output.token_ids)
    return {"loaded_s": loaded_s, "first_token_s": times[0], "second_token_s": times[-1]}
