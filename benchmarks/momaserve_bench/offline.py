"""A workload through the engine in this process: so many requests at a time, no HTTP."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from momaserve.engine import Engine
from momaserve.errors import QueueFullError
from momaserve.outputs import FinishReason, TokenOutput
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve.tokens.detokenize import ImageDone, OutputDecoder
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import ChatMessage, ImagePart, Prompt, TextPart
from momaserve_bench.batch_run import EngineFailedError
from momaserve_bench.workload import Kind, WorkItem

GREEDY = Distribution(temperature=0.0)


@dataclass(slots=True, kw_only=True)
class OfflineRun:
    """What a run took and made."""

    elapsed_s: float = 0.0
    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache held."""
    text_tokens: int = 0
    image_tokens: int = 0
    images: int = 0


def run_offline(
    engine: Engine, items: Sequence[WorkItem], *, concurrency: int, salt: str
) -> OfflineRun:
    """Answers `items` in their order, `concurrency` at a time.

    Encoding prompts, decoding answers and rendering pictures are part of it, as they are for
    whoever calls `LLM`.

    Args:
        salt: requests share computed prefixes only with those of runs with the same salt.

    Raises:
        EngineFailedError: a request that the engine could not compute.
        RequestError: one that it does not take.
    """
    run = OfflineRun(num_requests=len(items))
    waiting = deque(items)
    decoders: dict[str, OutputDecoder] = {}
    started = time.perf_counter()
    try:
        while waiting or decoders:
            while waiting and len(decoders) < concurrency:
                item = waiting.popleft()
                name = f"{salt}-{item.index}"
                prompt = prompt_of(engine.processor, item)
                submission = engine.make_submission(prompt, params_of(item, salt), name)
                try:
                    engine.add(submission)
                except QueueFullError:
                    if not decoders:
                        raise
                    waiting.appendleft(item)
                    break
                decoders[name] = engine.processor.decoder((), prompt)
                run.prompt_tokens += len(prompt.token_ids)
            for output in engine.step():
                _take(engine, output, decoders, run)
    except BaseException:  # an interrupt too: the engine may be used again
        for name in decoders:
            engine.abort(name)
        raise
    run.elapsed_s = time.perf_counter() - started
    return run


def _take(
    engine: Engine, output: TokenOutput, decoders: dict[str, OutputDecoder], run: OfflineRun
) -> None:
    processor = engine.processor
    if output.finish_reason in (FinishReason.ERROR, FinishReason.TIMEOUT):
        raise EngineFailedError(output.error or "a request timed out")
    decoder = decoders[output.request_id]
    events = list(decoder.push(output.token_ids))
    num_codes = sum(token in processor.spec.image_ids for token in output.token_ids)
    run.image_tokens += num_codes
    run.text_tokens += len(output.token_ids) - num_codes
    if output.finish_reason is not None:
        events += decoder.finish()
        run.cached_tokens += output.num_cached_tokens
        del decoders[output.request_id]
    for event in events:
        if isinstance(event, ImageDone):
            run.images += 1
            if processor.image is not None:
                processor.render(event.token_ids)


def prompt_of(processor: Processor, item: WorkItem) -> Prompt:
    """The prompt of a request; the same that the server makes of its body."""
    if item.token_ids:
        return processor.encode_ids(item.token_ids)
    parts: list[TextPart | ImagePart] = [TextPart(item.words)]
    if item.picture:
        parts.insert(0, ImagePart(Image.open(io.BytesIO(item.picture))))
    return processor.encode_chat([ChatMessage("user", tuple(parts))])


def params_of(item: WorkItem, salt: str) -> SamplingParams:
    """Greedy, and exactly as long as the request says."""
    draws = item.kind is Kind.IMAGE_OUTPUT and not item.token_ids
    return SamplingParams(
        mode=OutputMode.IMAGE if draws else OutputMode.TEXT,
        max_tokens=item.max_tokens,
        text=GREEDY,
        image=GREEDY,
        ignore_eos=True,
        seed=item.seed,
        cache_salt=salt,
    )
