"""Control-plane logging: one setup for all loggers, with records as lines of text or JSON.

Paths, names and error messages may contain text supplied by a caller. Control characters in such text are escaped, so
each record is one line and cannot imitate another record; the lines of a traceback are indented. The formatters belong
to the standard library's logging, because uvicorn, SQLAlchemy and httpx use it; another logging library would need the
same formatters for their records. Does not import other modules of the service.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from asgi_correlation_id import correlation_id

LogFormat = Literal["text", "json"]

FIELDS = ("request_id", "key", "project", "job")
"""Fields of JSON records that identify the request, key, project and job, if any."""
TRACEBACK_INDENT = "    | "
_context: ContextVar[dict[str, Any]] = ContextVar("log_context")


def escape(text: str) -> str:
    """Escape non-printable characters, which could end a line or change how the text is displayed."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@contextmanager
def log_context(**fields: str | None) -> Iterator[dict[str, Any]]:
    """Add fields to records logged in this context, and in threads and tasks that copy the context.

    Yields the fields as a dict that may be modified.
    """
    own = {**_context.get({}), **fields}
    token = _context.set(own)
    try:
        yield own
    finally:
        _context.reset(token)


def add_log_fields(**fields: str | None) -> None:
    """Add fields to the innermost `log_context`, so that the code that opened it also logs them."""
    _context.get({}).update(fields)


class TextFormatter(logging.Formatter):
    """Formats a record as one line, followed by the indented lines of its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        about = f"{self.formatTime(record)} {record.levelname} {record.name} [{correlation_id.get() or '-'}]"
        traceback = (TRACEBACK_INDENT + escape(line) for line in _traceback(self, record))
        return "\n".join([f"{about} {escape(record.getMessage())}", *traceback])


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"request_id": correlation_id.get(), **_context.get({})}
        about = {name: getattr(record, name, None) or fields.get(name) for name in FIELDS}
        traceback = "\n".join(_traceback(self, record))
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in about.items() if value is not None},
            **({"traceback": traceback} if traceback else {}),
        }
        return json.dumps(line, default=str)  # ASCII: JSON escapes every other character


FORMATTERS: dict[LogFormat, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def configure_logging(log_format: LogFormat) -> None:
    """Send every log record, warning and uncaught exception in this process to stderr in one format."""
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATTERS[log_format]())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("alembic", "httpx"):  # httpx logs every URL, and a webhook's may contain a secret
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_exception
    threading.excepthook = _log_thread_exception


def _log_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.critical("uncaught exception", exc_info=(kind, error, traceback))


def _log_thread_exception(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is None or isinstance(failure.exc_value, SystemExit):
        return
    name = failure.thread.name if failure.thread is not None else "unknown"
    exc_info = (failure.exc_type, failure.exc_value, failure.exc_traceback)
    logging.critical("uncaught exception in the thread %s", name, exc_info=exc_info)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    """Return the record's traceback and stack as lines. Ignores `exc_text`, which another formatter may have set."""
    lines = formatter.formatException(record.exc_info).splitlines() if record.exc_info else []
    return lines + (record.stack_info.splitlines() if record.stack_info else [])
