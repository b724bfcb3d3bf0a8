"""`LLM`: the engine as a function, for scripts and benchmarks. No thread, no HTTP."""

from __future__ import annotations

import sys
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from momaserve.config import CacheConfig, EngineConfig, SchedulerConfig
from momaserve.engine import Engine
from momaserve.errors import ConfigError, PromptError, QueueFullError
from momaserve.outputs import FinishReason, RequestStats, TokenLogprob, TokenOutput, TokenRouting
from momaserve.request import Submission
from momaserve.sampling import SamplingParams
from momaserve.tokens.detokenize import Event, ImageDone, OutputDecoder, TextDelta
from momaserve.tokens.prompt import ChatMessage, ImagePart, Prompt, TextPart

PromptLike = str | Sequence[int] | Sequence[str | Image.Image] | Prompt
"""Text, token ids, or parts of text and pictures in their order."""


@dataclass(slots=True)
class ChoiceResult:
    """One answer."""

    parts: list[str | Image.Image] = field(default_factory=list)
    """Text and pictures in the order generated (pictures only with an image tokenizer)."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    routing: list[TokenRouting] = field(default_factory=list)
    """Experts of the first of `token_ids`, when asked for; what ended the answer has none."""
    finish_reason: FinishReason | None = None
    stats: RequestStats | None = None
    """Its timings."""
    num_cached_tokens: int = 0
    """Prompt tokens that were computed before, for another request."""
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        return [part for part in self.parts if isinstance(part, Image.Image)]


@dataclass(slots=True)
class RequestResult:
    """All answers to one prompt."""

    prompt_token_ids: tuple[int, ...]
    choices: list[ChoiceResult]
    prompt_logprobs: list[TokenLogprob] | None = None
    """Entries for prompt tokens 1, 2, ... when asked for."""


@dataclass(slots=True)
class _Open:
    result: RequestResult
    choice: ChoiceResult
    decoder: OutputDecoder


class LLM:
    """Generates text and pictures offline.

    Args:
        checkpoint: a checkpoint directory, the name of a preset (random weights), or an engine
            that is already built.
        options: fields of EngineConfig, CacheConfig and SchedulerConfig by name.

    Raises:
        CheckpointError, ConfigError: as `Engine.load`.
    """

    def __init__(self, checkpoint: Path | str | Engine, **options: Any) -> None:
        self._open: dict[str, _Open] = {}
        if isinstance(checkpoint, Engine):
            if options:
                raise ConfigError(
                    f"an engine that is built takes no options, got {sorted(options)}"
                )
            self.engine = checkpoint
        else:
            self.engine = Engine.load(checkpoint, engine_config(options))

    def default_params(self, **changes: Any) -> SamplingParams:
        """The checkpoint's own sampling with `changes` (fields of SamplingParams)."""
        defaults = self.engine.defaults
        params = SamplingParams(
            text=defaults.text, image=defaults.image, guidance_scale=defaults.guidance_scale
        )
        return replace(params, **changes)

    def generate(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: str | None = None,
    ) -> list[RequestResult]:
        """Answer prompts, batched continuously; results keep the order of the prompts.

        Args:
            prompts: one prompt or several. A list of integers is one prompt of token ids; a
                list of strings is several prompts; parts go into a tuple.
            params: one for all or one each; None is the checkpoint's own sampling.
            progress: label of a progress bar on a terminal; None shows none.

        Raises:
            RequestError: a prompt or parameter that cannot be served; nothing stays queued.
        """
        listed = _as_list(prompts)
        if params is None:
            params = self.default_params()
        each = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise PromptError(f"got {len(listed)} prompts and {len(each)} sampling parameters")
        results: list[RequestResult] = []
        waiting: deque[Submission] = deque()
        self._open = {}
        for prompt_like, one in zip(listed, each, strict=True):
            prompt = self.encode(prompt_like)
            submission = self.engine.make_submission(prompt, one, uuid.uuid4().hex)
            names = submission.request_ids
            result = RequestResult(prompt.token_ids, [ChoiceResult() for _ in names])
            results.append(result)
            waiting.append(submission)
            for name, choice in zip(names, result.choices, strict=True):
                decoder = self.engine.processor.decoder(one.stop, prompt)
                self._open[name] = _Open(result, choice, decoder)
        try:
            self._run(waiting, progress)
        except BaseException:  # an interrupt too: the next call must not run what this one left
            for request_id in self._open:
                self.engine.abort(request_id)
            raise
        return results

    def _run(self, waiting: deque[Submission], progress: str | None) -> None:
        total = len(self._open)
        is_hidden = progress is None or not sys.stderr.isatty()
        with tqdm(total=total, desc=progress, disable=is_hidden, leave=False) as bar:
            while waiting or self.engine.has_work:
                self._fill(waiting)
                for output in self.engine.step():
                    self._take(output)
                bar.update(total - len(self._open) - bar.n)

    def encode(self, prompt: PromptLike) -> Prompt:
        """Raises PromptError for what the checkpoint cannot read."""
        processor = self.engine.processor
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            return processor.encode_text(prompt)
        if prompt and all(isinstance(item, int) for item in prompt):
            return processor.encode_ids([item for item in prompt if isinstance(item, int)])
        parts: list[TextPart | ImagePart] = []
        for item in prompt:
            if isinstance(item, str):
                parts.append(TextPart(item))
            elif isinstance(item, Image.Image):
                parts.append(ImagePart(item))
            else:
                raise PromptError(f"a prompt part must be text or a picture, got {type(item)}")
        return processor.encode_chat([ChatMessage("user", tuple(parts))])

    def _fill(self, waiting: deque[Submission]) -> None:
        """Queue as many submissions as the engine takes now."""
        while waiting:
            try:
                self.engine.add(waiting[0])
            except QueueFullError:
                return
            waiting.popleft()

    def _take(self, output: TokenOutput) -> None:
        open_ = self._open.get(output.request_id)
        if open_ is None:
            return
        choice, decoder = open_.choice, open_.decoder
        choice.token_ids += output.token_ids
        choice.num_cached_tokens = output.num_cached_tokens
        choice.logprobs += output.logprobs or ()
        choice.routing += output.routing
        if output.prompt_logprobs is not None and open_.result.prompt_logprobs is None:
            open_.result.prompt_logprobs = list(output.prompt_logprobs)  # each choice brings them
        self._show(choice, decoder.push(output.token_ids))
        if decoder.stopped and output.finish_reason is None:
            choice.stats = self.engine.abort(output.request_id, FinishReason.STOP)
            choice.finish_reason = FinishReason.STOP
        elif output.finish_reason is not None:
            choice.finish_reason = FinishReason.STOP if decoder.stopped else output.finish_reason
            choice.stats, choice.error = output.stats, output.error
        if choice.finish_reason is not None:
            self._show(choice, decoder.finish())
            del self._open[output.request_id]

    def _show(self, choice: ChoiceResult, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, TextDelta):
                if choice.parts and isinstance(choice.parts[-1], str):
                    choice.parts[-1] += event.text
                elif event.text:
                    choice.parts.append(event.text)
            elif isinstance(event, ImageDone) and self.engine.processor.image is not None:
                choice.parts.append(self.engine.processor.render(event.token_ids))


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from flat options: fields of it, of CacheConfig and of SchedulerConfig.

    Raises:
        ConfigError: an option that none of them has, or a value that cannot work.
    """
    own = set(EngineConfig.__slots__) - {"cache", "scheduler"}
    known = own | {*CacheConfig.__slots__, *SchedulerConfig.__slots__}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"unknown options {unknown}; there are {sorted(known)}")

    def pick(names: Collection[str]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in names}

    return EngineConfig(
        cache=CacheConfig(**pick(CacheConfig.__slots__)),
        scheduler=SchedulerConfig(**pick(SchedulerConfig.__slots__)),
        **pick(own),
    )


def _as_list(prompts: PromptLike | Iterable[PromptLike]) -> list[PromptLike]:
    if isinstance(prompts, str | Prompt | tuple):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [[item for item in listed if isinstance(item, int)]]
    whole = [item for item in listed if not isinstance(item, int | Image.Image)]
    if len(whole) < len(listed):
        raise PromptError(
            "a list holds whole prompts, or nothing but the token ids of one; the words and "
            "pictures of one prompt go into a tuple"
        )
    return whole
