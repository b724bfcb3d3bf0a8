"""A deterministic stand-in for `AsyncEngine`: bytes as text tokens, pictures of 2 x 2 codes.

Everything around it is real (processor, grammar, decoder, schemas); only the model is missing.
What it answers, and when, is up to the test: `answer` scripts the tokens, `gate` holds them
back one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from PIL import Image
from tokenizers import pre_tokenizers

from momaserve.async_engine import AsyncEngine, ChoiceOutput, EngineSnapshot
from momaserve.config import EngineConfig
from momaserve.errors import EngineDeadError, PromptError
from momaserve.models.config import ModelConfig
from momaserve.models.generation import GenerationDefaults
from momaserve.outputs import FinishReason, TokenLogprob, TokenOutput, TokenRouting
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.tokens.grammar import GrammarSpec
from momaserve.tokens.image import ImageCodec
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import Prompt
from momaserve.tokens.text import TextTokenizer

BOS, PAD, EOS, BEGIN, END, SEP = range(6)
FIRST_BYTE = 6
NUM_CODES = 16
NUM_TOKENS = 4
FIRST_CODE = FIRST_BYTE + 256
VOCAB_SIZE = FIRST_CODE + NUM_CODES
MAX_MODEL_LEN = 256
SPECIALS = ("<|bos|>", "<|pad|>", "<|eos|>", "<|begin_image|>", "<|end_image|>", "<|sep|>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|sep|>{% endfor %}"
MODEL_NAME = "fake"
TEXT = "Grüße! "  # has a character of two bytes


def byte_ids(text: str) -> list[int]:
    """One token per byte of UTF-8."""
    return tokenizer().encode(text)


def code_ids(*codes: int) -> list[int]:
    return [FIRST_CODE + code for code in codes]


def tokenizer() -> TextTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*SPECIALS, *alphabet])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    byte_level |= {"trim_offsets": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "special": True} | special for i, name in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    return TextTokenizer(definition, control_ids={BOS, PAD, EOS, BEGIN, END})


class FakeCodec:
    """Four grey squares; code c is the grey 16 c, a missing one is white."""

    image_size = 8

    def encode(self, image: Image.Image) -> tuple[int, ...]:
        small = image.convert("L").resize((2, 2))
        return tuple(FIRST_CODE + int(value) // 16 for value in small.tobytes())

    def decode(self, token_ids: tuple[int, ...]) -> Image.Image:
        if len(token_ids) != NUM_TOKENS:
            raise PromptError(f"a picture has {NUM_TOKENS} image ids, got {len(token_ids)}")
        greys = bytes(16 * (token_id - FIRST_CODE) for token_id in token_ids)
        small = Image.frombytes("L", (2, 2), greys)
        return small.resize((8, 8), Image.Resampling.NEAREST).convert("RGB")

    def decode_partial(self, token_ids: tuple[int, ...]) -> Image.Image:
        white = (FIRST_CODE + NUM_CODES - 1,) * (NUM_TOKENS - len(token_ids))
        return self.decode((*token_ids, *white))


def model_config(**changes: object) -> ModelConfig:
    group = {"num_experts": 4, "intermediate_size": 8}
    data: dict[str, Any] = {
        "model_type": "moma",
        "format_version": 1,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "norm_order": "post",
        "rms_norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "image": {
            "first_token_id": FIRST_CODE,
            "num_codes": NUM_CODES,
            "tokens_per_image": NUM_TOKENS,
            "grid": [2, 2],
            "begin_token_id": BEGIN,
            "end_token_id": END,
        },
        "expert_groups": [
            {"name": "text", "modalities": ["text"]} | group,
            {"name": "image", "modalities": ["image"]} | group,
        ],
        "depth_routing": None,
    }
    return ModelConfig.from_dict(data | changes)


def processor(*, has_text: bool = True, has_pixels: bool = True) -> Processor:
    return Processor(
        GrammarSpec.from_config(model_config()),
        text=tokenizer() if has_text else None,
        image=cast(ImageCodec, FakeCodec()) if has_pixels else None,
        template_source=TEMPLATE,
    )


@dataclass
class FakeEngine:
    """The public attributes of `momaserve.engine.Engine`."""

    processor: Processor = field(default_factory=processor)
    model_config: ModelConfig = field(default_factory=model_config)
    config: EngineConfig = field(default_factory=EngineConfig)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    max_model_len: int = MAX_MODEL_LEN
    model_name: str = MODEL_NAME


@dataclass(frozen=True)
class Submission:
    request_id: str
    prompt: Prompt
    params: SamplingParams


Answer = Callable[[SamplingParams, int], list[int]]


def default_answer(params: SamplingParams, index: int) -> list[int]:
    """Text, then a picture whose codes depend on the seed, as far as the mode allows."""
    seed = (params.seed or 0) + index
    picture = [BEGIN, *code_ids(*((seed + i) % NUM_CODES for i in range(NUM_TOKENS))), END]
    text = byte_ids(f"{TEXT}{seed}")
    parts = {
        OutputMode.TEXT: text,
        OutputMode.IMAGE: picture,
        OutputMode.INTERLEAVED: [*text, *picture, *byte_ids("!")],
    }
    return parts[params.mode]


def logprob(token_id: int, top: int) -> TokenLogprob:
    """A made-up log-probability that a test can recompute."""
    likeliest = tuple((FIRST_BYTE + i, -0.5 - i) for i in range(top))
    return TokenLogprob(token_id, -token_id / 8, likeliest)


def routing(token_id: int) -> TokenRouting:
    """Made-up experts that a test can recompute: one layer took the token, one let it pass."""
    return TokenRouting(token_id, group_of(token_id), ((token_id % 4,), None))


def group_of(token_id: int) -> str:
    return model_config().modality_of(token_id).label


class FakeStream(AsyncIterator[ChoiceOutput]):
    """What `generate` returns: outputs until every choice is finished or aborted."""

    def __init__(self, engine: FakeAsyncEngine, submission: Submission) -> None:
        self.request_id = submission.request_id
        self._engine = engine
        self._submission = submission
        self._outputs = engine.outputs(submission)
        self._open = set(range(submission.params.n))

    async def __anext__(self) -> ChoiceOutput:
        if not self._open:
            raise StopAsyncIteration
        item = await anext(self._outputs)
        if item.output.finish_reason is not None:
            self._discard(item.index)
        return item

    def abort(self, index: int | None = None, reason: FinishReason = FinishReason.ABORT) -> None:
        self._engine.abort_reasons.append(reason)
        name, n = self._submission.request_id, self._submission.params.n
        for choice in sorted(self._open) if index is None else [index]:
            self._engine.aborted.append(name if n == 1 else f"{name}-{choice}")
            self._discard(choice)

    def _discard(self, index: int) -> None:
        self._open.discard(index)
        if not self._open:
            self._engine.end(self._submission.request_id)


class FakeAsyncEngine:
    """Answers at once, one token a step, unless told otherwise."""

    def __init__(self, answer: Answer = default_answer, engine: FakeEngine | None = None) -> None:
        self.engine = engine or FakeEngine()
        self.answer = answer
        self.gate: asyncio.Semaphore | None = None
        """If set, each step of each choice takes one permit."""
        self.refusal: Exception | None = None
        """Raised by `generate`."""
        self.refusal_after = 0
        """Submissions that still pass before `refusal` is raised."""
        self.failure: tuple[int, FinishReason] | None = None
        """(tokens, reason): a choice ends like this after so many tokens."""
        self.failing_choices: set[int] | None = None
        """Those that `failure` ends; None is all."""
        self.num_cached_tokens = 0
        """What the outputs of first choices say; the others share its whole prompt."""
        self.submissions: list[Submission] = []
        self.aborted: list[str] = []
        self.abort_reasons: list[FinishReason] = []
        self.running: set[str] = set()
        self.ending: set[str] = set()
        """Submissions that `abort` ends."""
        self.stopped = asyncio.Event()
        """Set whenever a submission ends, for tests that wait for an abort."""
        self.started = asyncio.Event()
        self.tokens_at_once: list[int] = []
        """Set when the first submission arrives."""
        self.is_started = False
        self.is_closed = False
        self.is_healthy = True
        self.is_ready = True
        self.is_draining = False

    def as_engine(self) -> AsyncEngine:
        return cast(AsyncEngine, self)

    def start(self) -> None:
        self.is_started = True

    def close(self) -> None:
        self.is_closed = True

    async def drain(self, timeout_s: float) -> None:
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.running:
                    self.stopped.clear()
                    await self.stopped.wait()
        except TimeoutError:
            self.failure = (0, FinishReason.ABORT)
            if self.gate is not None:
                for _ in range(100):
                    self.gate.release()

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(num_running=len(self.running), num_waiting=0, kv_cache_usage=0.25)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        tokens_at_once: int = 1,
    ) -> FakeStream:
        """Gives out each token by itself, whatever `tokens_at_once` says; it is kept."""
        self.tokens_at_once.append(tokens_at_once)
        if self.is_draining:
            raise EngineDeadError("the engine is draining")
        if self.refusal is not None and len(self.submissions) >= self.refusal_after:
            raise self.refusal
        assert request_id is not None
        self.submissions.append(Submission(request_id, prompt, params))
        self.running.add(request_id)
        self.started.set()
        return FakeStream(self, self.submissions[-1])

    def abort(self, request_id: str) -> bool:
        """Ends it under its reader, with the step that it waits for."""
        self.ending.add(request_id)
        if self.gate is not None:
            self.gate.release()
        return request_id in self.running

    def end(self, request_id: str) -> None:
        self.running.discard(request_id)
        self.stopped.set()

    async def outputs(self, submission: Submission) -> AsyncGenerator[ChoiceOutput, None]:
        params = submission.params
        n, name = params.n, submission.request_id
        names = [name if n == 1 else f"{name}-{index}" for index in range(n)]
        whole = [self.answer(params, index) for index in range(n)]
        answers = [answer[: params.max_tokens] for answer in whole]
        ended: set[int] = set()
        for step in range(max(map(len, answers)) + 1):
            for index, answer in enumerate(answers):
                if index in ended or names[index] in self.aborted:
                    continue
                if self.gate is not None:
                    await self.gate.acquire()
                tokens = tuple(answer[step : step + 1])
                reason = None
                if step == len(answer):
                    is_cut = len(answer) < len(whole[index])
                    reason = FinishReason.LENGTH if is_cut else FinishReason.STOP
                fails = self.failing_choices is None or index in self.failing_choices
                if fails and self.failure is not None and step >= self.failure[0]:
                    tokens, reason = (), self.failure[1]
                if name in self.ending:
                    tokens, reason = (), FinishReason.ABORT
                output = self._output(names[index], tokens, submission.prompt, params, step, reason)
                if params.include_routing and step and reason is not FinishReason.ABORT:
                    output = replace(output, routing=(routing(answer[step - 1]),))
                    if reason is not None:  # the last token is never computed
                        output = replace(output, routing=())
                cached = len(submission.prompt.token_ids) if index else self.num_cached_tokens
                yield ChoiceOutput(index, replace(output, num_cached_tokens=cached))
                if reason is not None:
                    ended.add(index)

    def _output(
        self,
        name: str,
        tokens: tuple[int, ...],
        prompt: Prompt,
        params: SamplingParams,
        step: int,
        reason: FinishReason | None,
    ) -> TokenOutput:
        prompt_logprobs = logprobs = None
        is_scored = step == 0 and reason is not FinishReason.TIMEOUT
        if params.prompt_logprobs is not None and is_scored:
            ids = prompt.token_ids[1:]
            prompt_logprobs = tuple(logprob(i, params.prompt_logprobs) for i in ids)
        if params.logprobs is not None:
            logprobs = tuple(logprob(token_id, params.logprobs) for token_id in tokens)
        return TokenOutput(
            request_id=name,
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            error="out of luck" if reason is FinishReason.ERROR else None,
        )
