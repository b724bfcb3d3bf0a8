"""The queue of requests that do not run yet. Knows no block and no budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from momaserve.config import SchedulerConfig
from momaserve.errors import QueueFullError, RequestError
from momaserve.request import Request

RETRY_AFTER_S = 1
"""What a refused client is told to wait: a running request may end with any step."""

_PREEMPTED = -1
"""The lane of all requests that were started before."""


def age(request: Request) -> tuple[int, int]:
    """Smaller is older."""
    return request.params.priority, request.arrival_order


class WaitingQueue:
    """Requests by priority, then by arrival; the samples of one prompt stay behind the first.

    A follower (a request with `leader_id`) is not offered while its leader is on its way through
    the prompt: the step that ends the prompt lets it start from there (`take_followers`). Should
    the leader end before, the first of its followers leads the others.

    Requests that were preempted come back with the order they arrived in, so they are ahead of
    whoever came later, and are not counted as queued: no cap may turn them away.

    New requests may stand in lanes, by a number that does not change while they wait; there is
    an oldest one in each, besides the oldest of all. Whoever starts before an older one of
    another lane passes it, and that is counted (`Request.num_passes`).

    Costs O(log n) per request, and O(n) per request that passes others.
    """

    def __init__(
        self, config: SchedulerConfig, lane_of: Callable[[Request], int] | None = None
    ) -> None:
        """
        Args:
            lane_of: numbers from 0 on; None puts all new requests into one lane.
        """
        self._config = config
        self._lane_of = lane_of
        self._lanes: dict[int, list[tuple[int, int, Request]]] = {}
        self._queued: dict[str, Request] = {}
        self._followers: dict[str, dict[str, Request]] = {}
        self._preempted: set[str] = set()
        self.num_tokens = 0
        """Prompt tokens of all requests that wait and were never started."""

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._queued

    @property
    def num_new(self) -> int:
        """Requests that wait and were never started."""
        return len(self._queued) - len(self._preempted)

    def check_submission(self, num_requests: int, num_tokens: int) -> None:
        """Checks that an empty queue would take so many requests and prompt tokens at once.

        Raises:
            RequestError: no waiting would help; the message names value and limit.
        """
        config = self._config
        for unit, limit, count in (
            ("requests", config.max_queued_requests, num_requests),
            ("tokens", config.max_queued_tokens, num_tokens),
        ):
            if count > limit:
                raise RequestError(
                    f"the request brings {count} {unit} (n counts n) to a queue that never "
                    f"holds more than {limit} (max_queued_{unit})"
                )

    def check_room(self, num_requests: int, num_tokens: int) -> None:
        """Checks that the queue, as it is, takes so many more.

        Raises:
            RequestError: not even an empty one would.
            QueueFullError: it is too full now.
        """
        # First what no waiting can cure, so that no client retries for ever.
        self.check_submission(num_requests, num_tokens)
        config = self._config
        for unit, limit, num_queued, num_added in (
            ("requests", config.max_queued_requests, self.num_new, num_requests),
            ("tokens", config.max_queued_tokens, self.num_tokens, num_tokens),
        ):
            if num_queued + num_added > limit:
                raise QueueFullError(
                    f"the queue holds {num_queued} {unit}; {num_added} more would exceed its "
                    f"limit of {limit} (max_queued_{unit})",
                    retry_after_s=RETRY_AFTER_S,
                )

    def add(self, request: Request) -> None:
        """Takes a request that is new."""
        self._queued[request.request_id] = request
        self.num_tokens += request.num_prompt_tokens
        if request.leader_id is None:
            self._push(request)
        else:
            self._followers.setdefault(request.leader_id, {})[request.request_id] = request

    def put_back(self, request: Request) -> None:
        """Takes a request that was preempted."""
        self._queued[request.request_id] = request
        self._preempted.add(request.request_id)
        self._push(request)

    def peek(self) -> Request | None:
        """Who is next by age; it stays in the queue."""
        heads = [head for lane in self._lanes if (head := self.peek_lane(lane)) is not None]
        return min(heads, key=age, default=None)

    def peek_lane(self, lane: int) -> Request | None:
        """The oldest new request of a lane."""
        heap = self._lanes.get(lane)
        while heap and not self._stands_in(heap[0][2], lane):
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def peek_preempted(self) -> Request | None:
        """The oldest request that was preempted."""
        return self.peek_lane(_PREEMPTED)

    def is_preempted(self, request: Request) -> bool:
        """Whether a waiting request has been started before."""
        return request.request_id in self._preempted

    def count_passes(self, request: Request) -> None:
        """Takes note that a request starts before older ones of its priority, if any wait."""
        for lane, heap in self._lanes.items():
            head = self.peek_lane(lane)
            if lane == _PREEMPTED or head is None or age(head) > age(request):
                continue
            for _, _, other in heap:
                if age(other) < age(request) and self._stands_in(other, lane):
                    other.num_passes += 1

    def remove(self, request: Request) -> None:
        """Lets a waiting request go, because it starts or because it ends."""
        lane = self._lane(request)
        del self._queued[request.request_id]
        heap = self._lanes.get(lane, [])
        if heap and heap[0][2] is request:
            heapq.heappop(heap)
        elif len(heap) > 64 + 2 * len(self._queued):  # others go when they are many
            self._lanes[lane] = [entry for entry in heap if self._stands_in(entry[2], lane)]
            heapq.heapify(self._lanes[lane])
        if request.request_id in self._preempted:
            self._preempted.remove(request.request_id)
        else:
            self.num_tokens -= request.num_prompt_tokens
        if request.leader_id is not None:
            siblings = self._followers.get(request.leader_id)
            if siblings is not None:
                siblings.pop(request.request_id, None)

    def has_followers(self, leader_id: str) -> bool:
        """Whether others wait for this request to reach the end of its prompt."""
        return leader_id in self._followers

    def take_followers(self, leader_id: str) -> list[Request]:
        """The followers of a leader that has reached the end of its prompt.

        They stay in the queue, each on its own from now on (`release` or `remove` them).
        """
        followers = self._followers.pop(leader_id, None)
        return [] if followers is None else list(followers.values())

    def release(self, request: Request) -> None:
        """Lets a follower that `take_followers` gave queue on its own."""
        self._push(request)

    def replace_leader(self, leader_id: str) -> None:
        """Names the first follower of a leader that has ended the leader of the others."""
        followers = self.take_followers(leader_id)
        if not followers:
            return
        first, *others = followers
        first.leader_id = None
        self._push(first)
        for request in others:
            request.leader_id = first.request_id
        self._followers[first.request_id] = {r.request_id: r for r in others}

    def check(self) -> None:
        """Recounts: every waiting request is offered once, or stands behind its leader."""
        offered = [
            entry[2].request_id
            for lane, heap in self._lanes.items()
            for entry in heap
            if self._stands_in(entry[2], lane)
        ]
        behind = [name for group in self._followers.values() for name in group]
        assert sorted({*offered, *behind}) == sorted(self._queued), "a waiting request is lost"
        assert not set(offered) & set(behind), "a follower is offered before its leader"
        assert self._preempted <= self._queued.keys()
        assert self.num_tokens == sum(
            r.num_prompt_tokens for n, r in self._queued.items() if n not in self._preempted
        )

    def _lane(self, request: Request) -> int:
        if request.request_id in self._preempted:
            return _PREEMPTED
        return 0 if self._lane_of is None else self._lane_of(request)

    def _stands_in(self, request: Request, lane: int) -> bool:
        """Whether an entry of a lane's heap still counts; those of old stays are left behind."""
        return self._queued.get(request.request_id) is request and (
            (request.request_id in self._preempted) == (lane == _PREEMPTED)
        )

    def _push(self, request: Request) -> None:
        entry = (request.params.priority, request.arrival_order, request)
        heapq.heappush(self._lanes.setdefault(self._lane(request), []), entry)
