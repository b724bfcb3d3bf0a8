"""The requests that are being answered, by the ids that their clients know."""

from __future__ import annotations

from typing import Protocol

from momaserve.errors import RequestError

REPLY_PREFIXES = ("chatcmpl-", "cmpl-", "img-")
"""What stands before a request's id in the `id` of its reply, by route."""


class Abortable(Protocol):
    def abort(self) -> None: ...


class RunningRequests:
    """Used on the event loop alone."""

    def __init__(self) -> None:
        self._by_id: dict[str, Abortable] = {}

    def add(self, reply_id: str, request: Abortable) -> None:
        """Raises RequestError when the id is in use."""
        if reply_id in self._by_id:
            raise RequestError(f"request id {reply_id!r} is already in use", param="request_id")
        self._by_id[reply_id] = request

    def discard(self, reply_id: str, request: Abortable) -> None:
        """Forgets `request`, unless the id is another's by now."""
        if self._by_id.get(reply_id) is request:
            del self._by_id[reply_id]

    def abort(self, request_id: str) -> bool:
        """Abort what has this reply id, or this request id (without the reply's prefix).

        Returns:
            False when there is nothing of that name.
        """
        names = (request_id, *(prefix + request_id for prefix in REPLY_PREFIXES))
        found = [self._by_id[name] for name in names if name in self._by_id]
        for request in found:
            request.abort()
        return bool(found)
