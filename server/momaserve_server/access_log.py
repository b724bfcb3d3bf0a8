"""The access log: one line per request, at its end. Nothing of what was asked or answered."""

from __future__ import annotations

import logging
from typing import Any

from momaserve_server.request_record import RequestRecord

logger = logging.getLogger(__name__)

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines: of interest only to whoever debugs."""


class AccessLog:
    """A listener of `RecordMiddleware`."""

    def __init__(self, root_path: str = "") -> None:
        self._root_path = root_path

    def __call__(self, record: RequestRecord) -> None:
        is_probe = record.path.removeprefix(self._root_path) in PROBES
        logger.log(
            logging.DEBUG if is_probe else logging.INFO,
            "%s %s %s",
            record.method,
            record.path,
            record.status,
            extra={"fields": fields_of(record)},
        )


def fields_of(record: RequestRecord) -> dict[str, Any]:
    """What the line says, by name; without what does not apply."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "duration_s": round(record.duration_s, 6),
        "client": record.client,
        "error": record.error_code,
    }
    if record.usage is not None:
        fields["reply_id"] = record.reply_id
        fields["prompt_tokens"] = record.usage.prompt_tokens
        fields["completion_tokens"] = record.usage.completion_tokens
        reasons = dict.fromkeys(str(reason) for _, reason in sorted(record.finish_reasons.items()))
        fields["finish_reason"] = ",".join(reasons) or None
    return {name: value for name, value in fields.items() if value is not None}
