"""Whose turn it is to start. Knows no block, no budget and no clock."""

from __future__ import annotations

from collections.abc import Iterable

from momaserve.core.load import LoadMeter, StepLoad
from momaserve.core.model_costs import ModelCosts
from momaserve.core.waiting import WaitingQueue, age
from momaserve.modality import Modality
from momaserve.request import Request


class FirstCome:
    """The oldest waiting request is next, and nobody passes it."""

    def next(self, waiting: WaitingQueue, running: Iterable[Request]) -> Request | None:
        """Who may start now; None when nobody waits."""
        return waiting.peek()

    def may_fork(self, follower: Request, waiting: WaitingQueue) -> bool:
        """Whether a follower, which is in no lane, may start with its leader's last step."""
        oldest = waiting.peek()
        return oldest is None or age(follower) < age(oldest)


class RouterAware:
    """Lets requests pass that share experts with those that run, a limited number of times.

    What a request decodes next, text or a picture, says which experts it needs. Of the oldest
    waiting request of each modality the one is next whose token adds the fewest bytes of
    experts to a step of those that run.

    Nobody passes anybody unless at least `min_backlog` requests wait: with fewer the order
    hardly changes what the machine gets done, and whoever is passed waits for nothing.

    A request is passed by at most `max_num_passes` younger ones. The one that reaches this
    number is next, and its modality keeps the turn until the running requests have followed,
    that is until its tokens are the ones that add fewest. Without that, the modalities would
    alternate from there on and every step would need the experts of both.

    Invariants:
      * `request.num_passes <= max_num_passes` for every request that waits in the queue;
      * nobody passes a request of a smaller priority number, one that was preempted, or one of
        its own modality.
    """

    def __init__(
        self, costs: ModelCosts, meter: LoadMeter, *, max_num_passes: int, min_backlog: int
    ) -> None:
        self._costs = costs
        self._meter = meter
        self._max_num_passes = max_num_passes
        self._min_backlog = min_backlog
        self._turn: Modality | None = None

    def next(self, waiting: WaitingQueue, running: Iterable[Request]) -> Request | None:
        """Who may start now; None when nobody waits."""
        oldest = waiting.peek()
        if oldest is None:
            return None
        rival = self._rival(oldest, waiting)
        if rival is None:
            return oldest
        if oldest.num_passes >= self._max_num_passes:
            self._turn = self._meter.phase(oldest.sequence)
            return oldest
        cheaper = self._cheaper(running)
        if self._turn is None or cheaper is self._turn:
            self._turn = None
            wanted = cheaper
        else:
            wanted = self._turn
        return rival if self._meter.phase(rival.sequence) is wanted else oldest

    def may_fork(self, follower: Request, waiting: WaitingQueue) -> bool:
        """Whether a follower, which is in no lane, may start with its leader's last step."""
        oldest = waiting.peek()
        if oldest is None or age(follower) < age(oldest):
            return True
        heads = [h for m in Modality if (h := waiting.peek_lane(m)) and age(h) < age(follower)]
        phase = self._meter.phase(follower.sequence)
        return (
            self._turn in (None, phase)
            and self._may_pass(follower, waiting)
            and all(head.num_passes < self._max_num_passes for head in heads)
            and all(self._meter.phase(head.sequence) is not phase for head in heads)
        )

    def _rival(self, oldest: Request, waiting: WaitingQueue) -> Request | None:
        """The oldest waiting request of the other modality, if it may pass the oldest of all."""
        if waiting.is_preempted(oldest):
            return None
        phase = self._meter.phase(oldest.sequence)
        for modality in Modality:
            rival = waiting.peek_lane(modality)
            if modality is not phase and rival is not None and self._may_pass(rival, waiting):
                return rival
        return None

    def _may_pass(self, request: Request, waiting: WaitingQueue) -> bool:
        """Whether nobody waits whom it must not pass, however few have passed them yet."""
        oldest, preempted = waiting.peek(), waiting.peek_preempted()
        return (
            oldest is not None
            and waiting.num_new >= self._min_backlog
            and oldest.params.priority == request.params.priority
            and (preempted is None or age(request) < age(preempted))
        )

    def _cheaper(self, running: Iterable[Request]) -> Modality | None:
        """The modality whose next token adds fewer bytes of experts; None if none does."""
        rows = [0, 0]
        for request in running:
            rows[self._meter.phase(request.sequence)] += 1 + len(request.companions)
        load = StepLoad(text_tokens=rows[Modality.TEXT], image_tokens=rows[Modality.IMAGE])
        text, image = (self._costs.added_expert_bytes(load, modality) for modality in Modality)
        if text == image:
            return None
        return Modality.TEXT if text < image else Modality.IMAGE
