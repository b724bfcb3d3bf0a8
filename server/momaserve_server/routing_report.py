"""`include_routing` on the wire: the experts of each generated token, in the order of tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from momaserve.models.config import ModelConfig
from momaserve.outputs import TokenRouting


class RoutingReport:
    """Joins the tokens of one answer with what is known, a step later, of their experts.

    Invariant: after `finish`, every token that was pushed has been reported once, in order.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._unreported: deque[int] = deque()

    def push(
        self, token_ids: Sequence[int], routing: Sequence[TokenRouting]
    ) -> list[dict[str, Any]]:
        """Takes new tokens, and what is known of earlier ones; returns the entries of those."""
        self._unreported += token_ids
        entries: list[dict[str, Any]] = []
        for item in routing:
            token_id = self._unreported.popleft()
            assert token_id == item.token_id, (token_id, item)
            entries.append(_entry(token_id, item.group, item.experts))
        return entries

    def finish(self) -> list[dict[str, Any]]:
        """Entries of the tokens that ended the answer, which were never computed."""
        entries = [_entry(i, self._group_of(i), None) for i in self._unreported]
        self._unreported.clear()
        return entries

    def _group_of(self, token_id: int) -> str:
        modality = self._config.modality_of(token_id)
        return next(g.name for g in self._config.expert_groups if modality in g.modalities)


def _entry(
    token_id: int, group: str, experts: Sequence[Sequence[int] | None] | None
) -> dict[str, Any]:
    return {"token_id": token_id, "group": group, "experts": experts}
