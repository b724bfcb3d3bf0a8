"""One HTTP request being generated: submits it, decodes its choices, ends it in every case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from momaserve.async_engine import ChoiceOutput
from momaserve.modality import Modality
from momaserve.outputs import FinishReason, TokenLogprob
from momaserve.sampling import SamplingParams
from momaserve.tokens.detokenize import Event, OutputDecoder
from momaserve.tokens.prompt import Prompt
from momaserve_server.context import ServerContext
from momaserve_server.errors import GenerationFailedError, RequestAbortedError
from momaserve_server.merge import merged


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """What one step of the engine added to one choice."""

    index: int
    events: tuple[Event, ...]
    """Text and pictures that became known, in order."""
    token_ids: tuple[int, ...]
    """Generated tokens; those of a stop string are among them, though its text is cut."""
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str | None
    """"stop" or "length" on the last delta of a choice."""


@dataclass(slots=True)
class TokenCounts:
    """What a request used, all its prompts and choices together."""

    prompt_tokens: int = 0
    prompt_image_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage` of the text routes."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"image_tokens": self.prompt_image_tokens},
            "completion_tokens_details": {"image_tokens": self.image_tokens},
        }


class Generation:
    """All choices of one HTTP request.

    Owns its requests in the engine: whoever started it must call `aclose`, which aborts what
    still runs. Choice `i` of prompt `p` has the index `p * n + i`.
    """

    def __init__(
        self, context: ServerContext, prompts: Sequence[Prompt], params: SamplingParams
    ) -> None:
        self._context = context
        self._params = params
        self._streams: list[AsyncGenerator[ChoiceOutput, None]] = []
        self._request_ids: list[str] = []
        self._open = set(range(len(prompts) * params.n))
        self._failed = False
        processor = context.async_engine.engine.processor
        self._decoders: list[OutputDecoder] = [
            processor.decoder(params.stop, prompt) for prompt in prompts for _ in range(params.n)
        ]
        self.counts = TokenCounts()
        for prompt in prompts:
            self.counts.prompt_tokens += len(prompt.token_ids)
            self.counts.prompt_image_tokens += self._num_image_tokens(prompt.token_ids)

    @classmethod
    async def start(
        cls,
        context: ServerContext,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_id: str,
    ) -> Generation:
        """Submit all prompts, or none: what one refuses takes the others back.

        Raises:
            RequestError, QueueFullError, EngineDeadError: from the engine.
        """
        generation = cls(context, prompts, params)
        try:
            for number, prompt in enumerate(prompts):
                name = request_id if len(prompts) == 1 else f"{request_id}-{number}"
                stream = await context.async_engine.generate(prompt, params, request_id=name)
                generation._streams.append(stream)
                generation._request_ids.append(name)
        except BaseException:
            generation._failed = True
            await generation.aclose()
            raise
        return generation

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """Everything that the choices become, until all of them are finished.

        Raises:
            GenerationFailedError: the engine failed on this request.
            RequestAbortedError: something other than this request's reader ended it.
        """
        async with aclosing(merged(self._streams)) as outputs:
            async for number, item in outputs:
                index = number * self._params.n + item.index
                if index not in self._open:
                    continue  # the step in which a stop string was found had a successor
                yield self._delta(index, item)
                if not self._open:
                    return
        if self._open:
            self._failed = True
            raise GenerationFailedError("the engine ended this request without finishing it")

    async def aclose(self) -> None:
        """End the request, whatever state it is in. May be called more than once."""
        if self._open:
            if not self._failed:
                self._context.metrics.on_aborted("disconnect")
            self._open.clear()
            for request_id in self._request_ids:
                self._context.async_engine.abort(request_id)
        streams, self._streams = self._streams, []
        closing = [asyncio.ensure_future(stream.aclose()) for stream in streams]
        if closing:
            # In tasks of their own: a cancelled caller must not stop the closing half-way.
            await asyncio.shield(asyncio.gather(*closing, return_exceptions=True))

    def _delta(self, index: int, item: ChoiceOutput) -> ChoiceDelta:
        output = item.output
        self._raise_if_ended_early(output.finish_reason, output.error)
        decoder = self._decoders[index]
        events = decoder.push(output.token_ids)
        finish_reason: FinishReason | None = output.finish_reason
        if decoder.stopped:
            if finish_reason is None:
                self._context.async_engine.abort(output.request_id)
                self._context.metrics.on_stop_string()
            finish_reason = FinishReason.STOP
        elif finish_reason is not None:
            events += decoder.finish()
        if finish_reason is not None:
            self._open.discard(index)
        self.counts.completion_tokens += len(output.token_ids)
        self.counts.image_tokens += self._num_image_tokens(output.token_ids)
        return ChoiceDelta(
            index=index,
            events=tuple(events),
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=None if finish_reason is None else str(finish_reason),
        )

    def _raise_if_ended_early(self, reason: FinishReason | None, error: str | None) -> None:
        if reason is FinishReason.ERROR:
            self._failed = True
            raise GenerationFailedError(error or "the engine failed on this request")
        if reason is FinishReason.ABORT:
            self._failed = True
            is_draining = self._context.async_engine.is_draining
            self._context.metrics.on_aborted("drain" if is_draining else "request")
            raise RequestAbortedError("the request was ended before it finished")

    def _num_image_tokens(self, token_ids: Sequence[int]) -> int:
        modality_of = self._context.async_engine.engine.model_config.modality_of
        return sum(modality_of(token_id) is Modality.IMAGE for token_id in token_ids)
