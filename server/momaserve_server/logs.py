"""Everything that the server prints on stderr, as lines for people or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any

from momaserve_server.request_record import current_request_id

OURS = ("momaserve", "momaserve_server")
"""Loggers that `--log-level` is about; libraries are heard from warnings on."""


def configure_logging(log_format: str, log_level: str) -> None:
    """Makes this process log to stderr. For a server of its own, not for a library.

    With "json", whatever nobody catches and Python's own warnings become lines of the log too.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, StderrHandler)]:
        root.removeHandler(handler)
    handler = StderrHandler()
    handler.addFilter(_add_request_id)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(log_level.upper())
    logging.captureWarnings(True)
    if log_format == "json":
        threading.excepthook = _on_thread_exception


class StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at the time, each record at once."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = current_request_id()
    return True


def _on_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None:
        return
    name = "unknown" if args.thread is None else args.thread.name
    logging.getLogger(__name__).critical(
        "unexpected error in thread %s",
        name,
        exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
    )


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says by name: `extra={"fields": {...}}`."""
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    request_id = getattr(record, "request_id", None)
    if request_id is not None:
        fields.setdefault("request_id", request_id)
    return fields


class TextFormatter(logging.Formatter):
    """`momaserve: ...`; lines about requests, warnings and errors have a time."""

    def format(self, record: logging.LogRecord) -> str:
        line = "momaserve: "
        fields = _fields(record)
        is_warning = record.levelno >= logging.WARNING
        if is_warning or fields:
            line += _time(record) + " "
        if is_warning:
            line += f"{record.levelname.lower()}: "
        line += record.getMessage()
        said = {"method", "path", "status"}  # by the message itself
        line += "".join(f" {name}={value}" for name, value in fields.items() if name not in said)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, logger, message, the fields, and the stack of an error."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)
