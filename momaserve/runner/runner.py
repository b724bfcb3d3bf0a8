"""Runs one planned step on the device: inputs, forward pass, head, log-probabilities, sampling.

`execute` starts a step and `RunningStep.result` waits for it; in between, on a device of its own,
the next step can be planned and started.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from momaserve.core.plan import OWN, PlannedSequence, StepPlan
from momaserve.models.config import ModelConfig
from momaserve.outputs import TokenLogprob, TokenRouting
from momaserve.request import Request
from momaserve.runner.backends import Backend, lay_out_step
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.routing_recorder import (
    NO_COUNTS,
    RoutingCounts,
    RoutingRecorder,
    RoutingTrace,
)
from momaserve.runner.sampler import SampleRow
from momaserve.runner.upload import upload
from momaserve.tokens.grammar import Choices

_HEAD_ROWS = 128
"""Rows of the head computed at once for prompt log-probabilities, which bounds their memory."""


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What a step produced, by request id."""

    sampled: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    """Entries of the prompt tokens that follow the positions computed in this step."""
    broken: set[str] = field(default_factory=set)
    """Requests whose logits are not finite."""
    token_routing: dict[str, list[tuple[int, TokenRouting]]] = field(default_factory=dict)
    """(position, what its token used) of the generated tokens computed in this step."""
    routing: RoutingCounts
    entry_counts: list[list[int]] | None = None
    """For each sequence of the plan, how many depth-routed layers took each of its tokens; None
    where there are no such layers."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Log-probabilities of tokens and of the likeliest ones, still on the device."""

    token_ids: Tensor
    """int64 [S]."""
    logprobs: Tensor
    """float32 [S]."""
    top_ids: Tensor
    """int64 [S, k], best first."""
    top_logprobs: Tensor

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, num_top: int) -> _Table:
        """From float32 logits [S, V], before any mask."""
        table = logits.log_softmax(-1)
        values, ids = table.topk(min(num_top, table.shape[1]), dim=-1)
        chosen = table.gather(1, token_ids.unsqueeze(1)).squeeze(1)
        return cls(token_ids, chosen, ids, values)

    def on_host(self) -> _Table:
        """The same, once the device got this far."""
        fields = (self.token_ids, self.logprobs, self.top_ids, self.top_logprobs)
        return _Table(*(field.to("cpu", non_blocking=True) for field in fields))

    def entries(self) -> list[TokenLogprob]:
        return [
            TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))
            for token, value, ids, values in zip(
                self.token_ids.tolist(),
                self.logprobs.tolist(),
                self.top_ids.tolist(),
                self.top_logprobs.tolist(),
                strict=True,
            )
        ]


class RunningStep:
    """A step that was started; what it samples may be used on the device before it is known."""

    def __init__(
        self, recorder: RoutingRecorder | None, config: ModelConfig, device: torch.device
    ) -> None:
        self._device = device
        self._recorder = recorder
        self._config = config
        self._names: list[str] = []
        self._token_ids = torch.empty(0, dtype=torch.int64, device=device)
        self._is_finite = torch.empty(0, dtype=torch.bool, device=device)
        self._logprobs: dict[str, _Table] = {}
        self._prompt_logprobs: dict[str, list[_Table]] = {}
        self._entries: dict[tuple[str, int], Tensor] = {}
        self._entry_counts: tuple[Tensor, list[int]] | None = None
        """int64 [T], of each row, and the rows of each sequence."""
        self._traced: list[tuple[str, int]] = []
        self._trace: RoutingTrace | None = None
        """Selections of the (request, position) pairs of `_traced`."""
        self._host = self._token_ids, self._is_finite
        self._arrival: torch.cuda.Event | None = None
        """When what every step tells has come over; None where it is here at once."""

    @property
    def sampling(self) -> dict[str, Tensor]:
        """Token ids that are being sampled, int64 [1] each, on the device."""
        return {name: self._token_ids[i : i + 1] for i, name in enumerate(self._names)}

    @property
    def entries(self) -> dict[tuple[str, int], Tensor]:
        """Entries in depth-routed layers of each (request, companion), int64 [1] each."""
        return self._entries

    def add_drawn(self, names: Iterable[str], token_ids: Tensor, is_finite: Tensor) -> None:
        """What some requests draw, int64 [S], and whether their logits are finite, bool [S]."""
        self._names += names
        self._token_ids = torch.cat((self._token_ids, token_ids))
        self._is_finite = torch.cat((self._is_finite, is_finite))

    def send(self) -> None:
        """Starts to bring over what every step tells, in front of the next step's work."""
        if self._recorder is not None:
            self._recorder.close()
        if self._entry_counts is not None:
            counts, num_rows = self._entry_counts
            self._entry_counts = counts.to("cpu", non_blocking=True), num_rows
        self._logprobs = {name: table.on_host() for name, table in self._logprobs.items()}
        self._prompt_logprobs = {
            name: [table.on_host() for table in tables]
            for name, tables in self._prompt_logprobs.items()
        }
        if self._trace is not None:
            self._trace = self._trace.on_host()
        found = self._token_ids, self._is_finite
        self._host = found[0].to("cpu", non_blocking=True), found[1].to("cpu", non_blocking=True)
        if self._device.type == "cuda":
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def result(self) -> StepResult:
        """Wait until the step has run."""
        if self._arrival is not None:
            self._arrival.synchronize()
        recorder = self._recorder
        result = StepResult(routing=NO_COUNTS if recorder is None else recorder.counts())
        if self._entry_counts is not None:
            counts, num_rows = self._entry_counts
            result.entry_counts = [part.tolist() for part in torch.split(counts, num_rows)]
        if self._trace is not None:
            entries = self._trace.entries(self._config)
            for (name, position), entry in zip(self._traced, entries, strict=True):
                result.token_routing.setdefault(name, []).append((position, entry))
        for name, tables in self._prompt_logprobs.items():
            scores = [score for table in tables for score in table.entries()]
            result.prompt_logprobs[name] = scores
            if not all(math.isfinite(score.logprob) for score in scores):
                result.broken.add(name)
        for name, token, is_finite in zip(
            self._names, self._host[0].tolist(), self._host[1].tolist(), strict=True
        ):
            if not is_finite:
                result.broken.add(name)
                continue
            result.sampled[name] = token
            if name in self._logprobs:
                (result.logprobs[name],) = self._logprobs[name].entries()
        return result


class Runner:
    """Owns the backend and the KV memory."""

    def __init__(self, config: ModelConfig, backend: Backend, storage: KVStorage) -> None:
        self._config = config
        self._backend = backend
        self.storage = storage

    def check_device(self) -> None:
        """Waits for the device; raises what it raises where nothing can run on it any more."""
        if self.storage.k.device.type == "cuda":
            torch.cuda.synchronize(self.storage.k.device)

    @torch.inference_mode()
    def execute(
        self,
        plan: StepPlan,
        requests: Mapping[str, Request],
        rows: Mapping[str, SampleRow],
        *,
        scored: Collection[str] = (),
        traced: Collection[str] = (),
        after: RunningStep | None = None,
        count_routing: bool = True,
    ) -> RunningStep:
        """Start a step.

        Args:
            rows: how each request that gets a token is sampled.
            scored: requests whose prompt tokens get log-probabilities.
            traced: requests of whose generated tokens somebody wants to know the experts.
            after: the step in flight, whose samples this one computes.
            count_routing: whether somebody reads the routing counts; without, they are empty.
        """
        self.storage.copy_blocks(plan.copies)
        recorder = RoutingRecorder(keeps_rows=bool(traced)) if count_routing or traced else None
        batch, entries = lay_out_step(
            self._backend,
            plan,
            requests,
            self._config,
            self.storage,
            recorder,
            {} if after is None else after.sampling,
            {} if after is None else after.entries,
        )
        step = RunningStep(recorder, self._config, self.storage.k.device)
        hidden = self._backend.forward(plan, batch, entries)  # [T, D]
        if entries is not None:
            step._entry_counts = entries.finish(), [s.num_new_tokens for s in plan.sequences]
            step._entries = entries.by_name()
        traced_rows: list[int] = []
        last_row: dict[tuple[str, int], int] = {}
        row = 0
        for planned in plan.sequences:
            request = requests[planned.request_id]
            if planned.companion == OWN and planned.request_id in scored:
                chunk = hidden[row : row + planned.num_new_tokens]
                tables = self._score_prompt(planned, request, chunk)
                step._prompt_logprobs[planned.request_id] = tables
            if planned.companion == OWN and planned.request_id in traced:
                first = max(planned.start, request.num_prompt_tokens)
                positions = range(first, planned.start + planned.num_new_tokens)
                step._traced += [(planned.request_id, position) for position in positions]
                traced_rows += [row + position - planned.start for position in positions]
            row += planned.num_new_tokens
            last_row[planned.request_id, planned.companion] = row - 1
        if recorder is not None and traced_rows:
            step._trace = recorder.trace(batch, traced_rows)
        for ids, part in self._by_head(requests, rows):
            self._sample(hidden, last_row, plan, requests, part, ids, step)
        step.send()
        return step

    def _sample(
        self,
        hidden: Tensor,
        last_row: Mapping[tuple[str, int], int],
        plan: StepPlan,
        requests: Mapping[str, Request],
        rows: Mapping[str, SampleRow],
        ids: range,
        step: RunningStep,
    ) -> None:
        """Draws a token for each of some rows, all of them among `ids`."""
        own = [last_row[plan.forks.get(name, name), OWN] for name in rows]
        guided = [
            (index, last_row[name, companion], row.guidance_scale)
            for index, (name, row) in enumerate(rows.items())
            for companion in range(len(requests[name].companions))
        ]
        last = np.array(own + [row for _, row, _ in guided])
        all_logits = self._backend.logits(hidden[upload(last, hidden.device)], ids)
        logits = all_logits[: len(own)]
        combined = guide(logits, all_logits[len(own) :], guided)
        token_ids, is_finite = self._backend.sample(combined, list(rows.values()), ids.start)
        step.add_drawn(rows, token_ids, is_finite)
        for index, name in enumerate(rows):
            num_top = requests[name].params.logprobs
            if num_top is not None:
                mine = slice(index, index + 1)
                step._logprobs[name] = _Table.of(logits[mine], token_ids[mine], num_top)

    def _by_head(
        self, requests: Mapping[str, Request], rows: Mapping[str, SampleRow]
    ) -> list[tuple[range, dict[str, SampleRow]]]:
        """Rows by the ids whose logits they need: a code of a picture needs no text's head.

        So what a row needs does not depend on the others of its step.
        """
        if self._config.image is None:
            return [(range(self._config.vocab_size), dict(rows))] if rows else []
        image = self._config.image
        codes: dict[str, SampleRow] = {}
        others: dict[str, SampleRow] = {}
        for name, row in rows.items():
            is_code = (
                row.choices is Choices.IMAGE
                and not row.bias
                and row.penalties is None
                and requests[name].params.logprobs is None
            )
            (codes if is_code else others)[name] = row
        parts = (
            (range(image.first_token_id, image.stop_token_id), codes),
            (range(self._config.vocab_size), others),
        )
        return [(ids, part) for ids, part in parts if part]

    def _score_prompt(
        self, planned: PlannedSequence, request: Request, hidden: Tensor
    ) -> list[_Table]:
        """Log-probabilities of the prompt tokens after positions [start, start + len(hidden))."""
        last = min(planned.start + len(hidden), request.num_prompt_tokens - 1)
        wanted_ids = request.sequence.token_ids[planned.start + 1 : last + 1]
        targets = upload(np.array(wanted_ids, np.int64), hidden.device)
        every = range(self._config.vocab_size)
        tables: list[_Table] = []
        for first in range(0, len(targets), _HEAD_ROWS):
            wanted = targets[first : first + _HEAD_ROWS]
            logits = self._backend.logits(hidden[first : first + len(wanted)], every)
            tables.append(_Table.of(logits, wanted, request.params.prompt_logprobs or 0))
        return tables


def guide(logits: Tensor, companions: Tensor, guided: Sequence[tuple[int, int, float]]) -> Tensor:
    """Guided logits: c + sum over companions of (scale - 1) * (c - u).

    With one companion that is u + scale * (c - u), classifier-free guidance (Ho & Salimans,
    2207.12598).

    Args:
        logits: float32 [S, V].
        companions: float32 [C, V].
        guided: for each companion the row of `logits` that it guides, its own row (unused
            here), and its scale.
    """
    if not guided:
        return logits
    target = upload(np.array([index for index, _, _ in guided]), logits.device)
    scales = np.array([scale for _, _, scale in guided], np.float32)
    strength = upload(scales - 1, logits.device)
    return logits.index_add(0, target, (logits[target] - companions) * strength.unsqueeze(1))
