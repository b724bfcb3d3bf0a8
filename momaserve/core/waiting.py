"""The queue of requests that do not run yet. Knows no block and no budget."""

from __future__ import annotations

import heapq

from momaserve.config import SchedulerConfig
from momaserve.errors import QueueFullError, RequestError
from momaserve.request import Request

RETRY_AFTER_S = 1
"""What a refused client is told to wait: a running request may end with any step."""


class WaitingQueue:
    """Requests by priority, then by arrival; the samples of one prompt stay behind the first.

    A follower (a request with `leader_id`) is not offered while its leader is on its way through
    the prompt: the step that ends the prompt lets it start from there (`take_followers`). Should
    the leader end before, the first of its followers leads the others.

    Requests that were preempted come back with the order they arrived in, so they are ahead of
    whoever came later, and are not counted as queued: no cap may turn them away.

    Costs O(log n) per request.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._heap: list[tuple[int, int, Request]] = []
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
        """Who is next; it stays in the queue."""
        heap = self._heap
        while heap and not self._is_queued(heap[0][2]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def remove(self, request: Request) -> None:
        """Lets a waiting request go, because it starts or because it ends."""
        del self._queued[request.request_id]
        if self._heap and self._heap[0][2] is request:
            heapq.heappop(self._heap)
        elif len(self._heap) > 64 + 2 * len(self._queued):  # others go when they are many
            self._heap = [entry for entry in self._heap if self._is_queued(entry[2])]
            heapq.heapify(self._heap)
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
        offered = [entry[2].request_id for entry in self._heap if self._is_queued(entry[2])]
        behind = [name for group in self._followers.values() for name in group]
        assert sorted({*offered, *behind}) == sorted(self._queued), "a waiting request is lost"
        assert not set(offered) & set(behind), "a follower is offered before its leader"
        assert self._preempted <= self._queued.keys()
        assert self.num_tokens == sum(
            r.num_prompt_tokens for n, r in self._queued.items() if n not in self._preempted
        )

    def _is_queued(self, request: Request) -> bool:
        return self._queued.get(request.request_id) is request

    def _push(self, request: Request) -> None:
        entry = (request.params.priority, request.arrival_order, request)
        heapq.heappush(self._heap, entry)
