"""One HTTP request being generated: submits it, decodes its choices, ends it in every case."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from momaserve.async_engine import ChoiceOutput, GenerationStream
from momaserve.errors import DeadlineError, MomaserveError
from momaserve.modality import Modality
from momaserve.outputs import FinishReason, TokenLogprob
from momaserve.sampling import SamplingParams
from momaserve.tokens.detokenize import Event, OutputDecoder
from momaserve.tokens.prompt import Prompt
from momaserve_server.context import ServerContext
from momaserve_server.errors import GenerationFailedError, RequestAbortedError
from momaserve_server.merge import merged
from momaserve_server.request_record import current_record
from momaserve_server.routing_report import RoutingReport
from momaserve_server.shadow_tap import ShadowTap

TOKENS_AT_ONCE = 16
"""Of an answer that is sent whole."""
UNANSWERED = (None, FinishReason.TIMEOUT)
"""Finish reasons of outputs that are no answer unless they bring tokens."""


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
    routing: tuple[dict[str, Any], ...]
    """Entries of `include_routing`, which lag behind `token_ids`."""
    finish_reason: str | None
    """"stop", "length" or "timeout" on the last delta of a choice."""


@dataclass(slots=True)
class TokenCounts:
    """What a request used, all its prompts and choices together."""

    prompt_tokens: int = 0
    prompt_image_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were in the prefix cache when each prompt's first choice started."""
    completion_tokens: int = 0
    image_tokens: int = 0

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage` of the text routes."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "image_tokens": self.prompt_image_tokens,
            },
            "completion_tokens_details": {"image_tokens": self.image_tokens},
        }


class Generation:
    """All choices of one HTTP request.

    Owns its requests in the engine: whoever started it must call `close`, which aborts what
    still runs. Choice `i` of prompt `p` has the index `p * n + i`.
    """

    def __init__(
        self, context: ServerContext, prompts: Sequence[Prompt], params: SamplingParams
    ) -> None:
        self._context = context
        self._params = params
        self._is_traced = params.include_routing
        self._streams: list[GenerationStream] = []
        self._open = set(range(len(prompts) * params.n))
        self._unheard = set(range(len(prompts)))  # prompts whose first choice has not come yet
        self._has_answer = False
        self._is_aborted = False
        self._is_told = False  # whether the client learns of the end from an error
        processor = context.async_engine.engine.processor
        self._decoders: list[OutputDecoder] = [
            processor.decoder(params.stop, prompt, every_code=True)
            for prompt in prompts
            for _ in range(params.n)
        ]
        config = context.async_engine.engine.model_config
        self._reports = [RoutingReport(config) for _ in self._decoders]
        self._request_id = ""
        self.counts = TokenCounts()
        self._record = current_record()
        self._tap: ShadowTap | None = None
        self.has_timed_out = False
        """Whether `timeout_s` cut a choice off."""

    @classmethod
    async def start(
        cls,
        context: ServerContext,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_id: str,
        *,
        tokens_at_once: int = 1,
    ) -> Generation:
        """Submit all prompts, or none: what one refuses takes the others back.

        Args:
            tokens_at_once: as `AsyncEngine.generate`; where strings end an answer, each token is
                looked at.

        Raises:
            RequestError, QueueFullError, EngineDeadError: from the engine.
        """
        generation = cls(context, prompts, params)
        context.running.add(request_id, generation)
        generation._request_id = request_id
        if context.shadow_eval is not None:
            engine = context.async_engine.engine.config
            generation._tap = ShadowTap(context.shadow_eval, engine, prompts, params, request_id)
        try:
            for number, prompt in enumerate(prompts):
                name = request_id if len(prompts) == 1 else f"{request_id}-{number}"
                stream = await context.async_engine.generate(
                    prompt,
                    params,
                    request_id=name,
                    tokens_at_once=1 if params.stop else tokens_at_once,
                )
                generation._streams.append(stream)
                if generation._is_aborted:  # while it was on its way to the engine
                    context.async_engine.abort(stream.request_id)
                generation._count_prompt(prompt)  # only now is it sure to be of bounded length
        except BaseException:
            generation._is_told = True
            generation.close()
            raise
        generation._record.begin(request_id, params, generation.counts)
        return generation

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """Everything that the choices become, until all of them are finished.

        The request is over by the time that the reader learns so: its id is free again.

        Raises:
            GenerationFailedError: the engine failed on this request.
            RequestAbortedError: something other than this request's reader ended it.
            EngineDeadError: the engine stopped.
        """
        try:
            async with aclosing(merged(self._streams)) as outputs:
                async for number, item in outputs:
                    index = number * self._params.n + item.index
                    if index not in self._open:
                        continue  # made before the engine heard of a stop string
                    delta = self._delta(index, number, item)
                    if not self._open:
                        self.close()
                    yield delta
                    if not self._open:
                        return
        except MomaserveError:
            self._is_told = True
            self.close()
            raise
        self._is_told = True
        raise GenerationFailedError("the engine ended this request without finishing it")

    def require_answer(self) -> None:
        """Call it at the end of a reply that is sent whole.

        Raises:
            DeadlineError: time was up before any choice had begun.
        """
        if self.has_timed_out and not self._has_answer:
            raise DeadlineError(f"timeout_s {self._params.timeout_s} passed before the first token")

    def abort(self) -> None:
        """End the request under its reader, who is told so."""
        self._is_aborted = True
        for stream in self._streams:
            self._context.async_engine.abort(stream.request_id)

    def close(self) -> None:
        """End the request, whatever state it is in. May be called more than once."""
        self._context.running.discard(self._request_id, self)
        if self._open and not self._is_told:
            self._context.metrics.on_aborted("disconnect")
        self._open.clear()
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.abort()

    def _delta(self, index: int, number: int, item: ChoiceOutput) -> ChoiceDelta:
        output = item.output
        self._record.hear(index, output)
        if output.finish_reason is FinishReason.ERROR:
            raise GenerationFailedError(output.error or "the engine failed on this request")
        if output.finish_reason is FinishReason.ABORT:
            raise self._aborted()
        is_timeout = output.finish_reason is FinishReason.TIMEOUT
        self.has_timed_out |= is_timeout
        self._has_answer |= bool(output.token_ids) or output.finish_reason not in UNANSWERED
        if item.index == 0 and number in self._unheard:
            self._unheard.discard(number)
            self.counts.cached_tokens += output.num_cached_tokens
        decoder, report = self._decoders[index], self._reports[index]
        routing = report.push(output.token_ids, output.routing) if self._is_traced else []
        events = decoder.push(output.token_ids)
        finish_reason: FinishReason | None = output.finish_reason
        if decoder.stopped:
            if finish_reason is None:
                self._streams[number].abort(item.index, FinishReason.STOP)
            finish_reason = FinishReason.STOP
        elif finish_reason is not None:
            events += decoder.finish()
        if finish_reason is not None:
            self._open.discard(index)
            self._record.end_choice(index, finish_reason)
            routing += report.finish()
        if self._tap is not None:
            self._tap.push(index, output.token_ids, is_last=finish_reason is not None)
        self.counts.completion_tokens += len(output.token_ids)
        self.counts.image_tokens += self._num_image_tokens(output.token_ids)
        return ChoiceDelta(
            index=index,
            events=tuple(events),
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            routing=tuple(routing),
            finish_reason=None if finish_reason is None else str(finish_reason),
        )

    def _aborted(self) -> RequestAbortedError:
        is_draining = self._context.async_engine.is_draining
        self._context.metrics.on_aborted("drain" if is_draining else "api")
        if is_draining:
            return RequestAbortedError("the server shut down before the request was finished")
        return RequestAbortedError("the request was aborted", is_final=True)

    def _count_prompt(self, prompt: Prompt) -> None:
        self.counts.prompt_tokens += len(prompt.token_ids)
        self.counts.prompt_image_tokens += self._num_image_tokens(prompt.token_ids)

    def _num_image_tokens(self, token_ids: Sequence[int]) -> int:
        modality_of = self._context.async_engine.engine.model_config.modality_of
        return sum(modality_of(token_id) is Modality.IMAGE for token_id in token_ids)
