"""Shadow evaluation: scores a sample of finished requests on a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch

from momaserve.config import RoutingPolicy
from momaserve.errors import ConfigError
from momaserve.models.moma import MomaModel
from momaserve.router_lab.shadow.batch import BatchRule, Gathered, scopes
from momaserve.router_lab.shadow.evaluation import evaluate
from momaserve.router_lab.shadow.pace import Pace, StoppedError
from momaserve.router_lab.shadow.sample import (
    MAX_QUEUED_TOKENS,
    Sample,
    SampleQueue,
    is_picked,
)
from momaserve.router_lab.shadow.totals import WINDOW_TOKENS, Totals

logger = logging.getLogger(__name__)

MIN_ANSWER_TOKENS = 2
"""An answer of one token has nothing that a router of an answer decided."""
CLOSE_TIMEOUT_S = 2.0
"""How long `close` waits for a piece of work to end; the thread is a daemon."""
_LOWEST_PRIORITY = 19


class ShadowEval:
    """Picks requests, keeps their tokens in memory until they are scored, and adds up findings.

    Only reads the model's weights, so the engine may use them at the same time; it calls the torch
    module, never a runner, whose buffers are the engine's. At most MAX_QUEUED_TOKENS tokens wait,
    and one batch of at most `rule.max_num_tokens` tokens and one context is scored. Its log lines
    hold no token.
    """

    def __init__(
        self,
        model: MomaModel,
        *,
        rate: float,
        policy: RoutingPolicy,
        max_model_len: int,
        is_busy: Callable[[], bool] = lambda: False,
        is_stopping: Callable[[], bool] = lambda: False,
        rule: BatchRule | None = None,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        window_tokens: int = WINDOW_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            rate: share of requests that are picked, in (0, 1].
            policy: whose decisions are compared with expert choice.
            max_model_len: longest sample, in tokens.
            is_busy: whether the engine has work.
            is_stopping: whether scoring is to end, since the server does.

        Raises:
            ConfigError: the model has no routers, not those that `policy` needs, or no weights
                any more, since an engine packed them (`EngineConfig.keep_weights`).
        """
        kinds = scopes(model.config)
        if not kinds:
            groups = ", ".join(repr(group.name) for group in model.config.expert_groups)
            raise ConfigError(
                f"shadow_eval {rate:g}: there are no routers to compare, as this checkpoint has "
                f"one expert in every group ({groups}) and no depth routing"
            )
        missing = model.missing_for(policy)
        if missing is not None:
            raise ConfigError(f"shadow_eval {rate:g}: {missing}")
        if any(parameter.numel() == 0 for parameter in model.parameters()):
            raise ConfigError(
                f"shadow_eval {rate:g}: the engine gave up the model's weights; build it with "
                "keep_weights"
            )
        self.rate = rate
        self.policy = policy
        self.not_routed = tuple(
            group.name for group in model.config.expert_groups if group.name not in kinds
        )
        """Groups of one expert, of which nothing is told."""
        self.totals = Totals(kinds, window_tokens=window_tokens)
        self._model = model
        self._max_model_len = max_model_len
        self._rule = rule or BatchRule()
        self._clock = clock
        self._queue = SampleQueue(max_queued_tokens)
        self._closed = threading.Event()
        self._is_stopping = is_stopping
        self._pace = Pace(is_busy, is_stopping, self._closed, clock=clock)
        self._has_begun = threading.Event()
        self._thread: threading.Thread | None = None

    # --- any thread ------------------------------------------------------------------------------

    def picks(self, name: str) -> bool:
        """Whether the answer of this name is to be offered; the same for the same name."""
        return is_picked(name, self.rate)

    def offer(self, sample: Sample) -> None:
        """Take a finished request that was picked. Never waits.

        One that is too short to tell anything is left out. One that is longer than the context, and
        the oldest ones where there is no room, are dropped and counted.
        """
        if sample.num_tokens - sample.num_prompt_tokens < MIN_ANSWER_TOKENS:
            return
        is_too_long = sample.num_tokens > self._max_model_len
        self.totals.on_dropped(1 if is_too_long else self._queue.offer(sample))

    @property
    def num_waiting_tokens(self) -> int:
        return self._queue.num_tokens

    def start(self) -> None:
        """Start the thread. Call it before other threads compute: see `_settle_down`."""
        if self.not_routed:
            names = ", ".join(self.not_routed)
            logger.info("shadow evaluation leaves out groups of one expert: %s", names)
        num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="momaserve-shadow", daemon=True)
        self._thread.start()
        self._has_begun.wait()
        torch.set_num_threads(num_threads)

    def close(self) -> None:
        """Forget what waits, and end the thread within CLOSE_TIMEOUT_S."""
        self._closed.set()
        self._queue.close()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    # --- its own thread --------------------------------------------------------------------------

    def _run(self) -> None:
        self._settle_down()
        try:
            while True:
                gathered = self._gather()
                self._pace.begin()
                try:
                    self._score(gathered)
                except StoppedError:
                    raise
                except Exception as error:
                    self._tell(error)
        except StoppedError:
            self._queue.close()

    def _settle_down(self) -> None:
        """One core, and only what others leave of it, where threads have priorities (Linux)."""
        # torch has one number for threads that have not computed yet, and gives each its own at
        # the first look. This thread looks now; `start` then puts the others' number back.
        torch.set_num_threads(1)
        torch.get_num_threads()
        if sys.platform == "linux":  # elsewhere it would be the whole process
            with contextlib.suppress(OSError):  # a sandbox may forbid it; the pace holds anyway
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        self._has_begun.set()

    def _gather(self) -> Gathered:
        """Wait until enough samples are there. Raises StoppedError."""
        gathered, began = Gathered(self._model.config), 0.0
        while True:
            due_s = self._rule.ready_after_s(gathered.num_tokens, gathered.by_kind)
            left_s = None if due_s is None else due_s - (self._clock() - began)
            sample = None
            if left_s is None or left_s > 0:
                sample = self._queue.get(left_s)
            if self._closed.is_set() or self._is_stopping():
                raise StoppedError
            if sample is None:
                return gathered
            if not gathered.samples:
                began = self._clock()
            gathered.add(sample)

    def _score(self, gathered: Gathered) -> None:
        found = evaluate(
            self._model,
            gathered.samples,
            self.policy,
            min_tokens=self._rule.min_tokens,
            pause=self._pace,
        )
        self.totals.add(found)

    def _tell(self, error: Exception) -> None:
        """Count a failure; of the first one log where it was, not its words, which might quote."""
        if self.totals.on_failed():
            logger.error(
                "shadow evaluation failed with %s; it goes on, and counts further failures\n%s",
                type(error).__name__,
                "".join(traceback.format_tb(error.__traceback__)),
            )
