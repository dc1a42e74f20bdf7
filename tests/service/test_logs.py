"""Tests for log records: text from callers cannot forge or hide lines, and JSON records include their context."""

from __future__ import annotations

import json
import logging
import sys
import threading
from types import TracebackType

import pytest
from asgi_correlation_id import correlation_id
from hypothesis import given
from hypothesis import strategies as st

from service.logs import (
    FORMATTERS,
    TRACEBACK_INDENT,
    JsonFormatter,
    TextFormatter,
    add_log_fields,
    configure_logging,
    escape,
    log_context,
)

FORGED = "1\n2026-01-01 00:00:00,000 ERROR service [-] the storage is gone"


def record_of(message: str, *args: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    exc_info: tuple[type[BaseException], BaseException, TracebackType | None] | None
    exc_info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("service.test", logging.ERROR, __file__, 1, message, args, exc_info)
    vars(record).update(extra)
    return record


def raised(message: str) -> ValueError:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


@given(st.text())
def test_a_message_is_one_line_of_printable_text(text: str) -> None:
    for formatter in FORMATTERS.values():
        line = formatter().format(record_of("%s", text))
        assert len(line.splitlines()) == 1
        assert line.isprintable()


@given(st.text())
def test_every_line_of_a_traceback_is_indented(text: str) -> None:
    first, *rest = TextFormatter().format(record_of("failed", error=raised(text))).splitlines()
    assert first.endswith("failed")
    assert len(rest) > 2
    assert all(line.startswith(TRACEBACK_INDENT) and line.isprintable() for line in rest)


def test_a_traceback_is_a_single_value_in_a_json_record() -> None:
    line = JsonFormatter().format(record_of("failed", error=raised(FORGED)))
    assert "\n" not in line
    assert FORGED in json.loads(line)["traceback"]


def test_line_breaks_and_terminal_sequences_are_shown_as_escapes() -> None:
    assert escape("a\r\n\x1b[2Kb\u2028\x85c\u202e") == r"a\r\n\x1b[2Kb\u2028\x85c\u202e"
    assert escape("Grüße, 世界 🙂") == "Grüße, 世界 🙂"


def test_a_json_record_contains_its_request_key_project_and_job() -> None:
    token = correlation_id.set("a-request")
    try:
        with log_context(key="a-key", project=None) as fields:
            with log_context(job="train-1"):
                inner = json.loads(JsonFormatter().format(record_of("%d of %s", 1, "two")))
            add_log_fields(project="vision")
            assert fields["project"] == "vision"
            outer = json.loads(JsonFormatter().format(record_of("outer")))
    finally:
        correlation_id.reset(token)
    about = {"level": "ERROR", "logger": "service.test"}
    assert inner.pop("time").endswith("+00:00")
    assert inner == {**about, "message": "1 of two", "request_id": "a-request", "key": "a-key", "job": "train-1"}
    assert outer.items() >= {"request_id": "a-request", "key": "a-key", "project": "vision"}.items()
    assert "job" not in outer
    after = json.loads(JsonFormatter().format(record_of("after", job="train-2")))
    assert after.keys() == {"time", "level", "logger", "message", "job"}  # `extra` of one record


def test_warnings_and_uncaught_exceptions_are_logged_as_records(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for module, name in ((sys, "excepthook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    try:
        configure_logging("json")
        logging.getLogger("py.warnings").warning("%s", FORGED)
        sys.excepthook(ValueError, raised(FORGED), None)
        thread = threading.Thread(target=raise_forged, name="a\nb")
        thread.start()
        thread.join()
        logging.getLogger("httpx").info("GET https://hooks.example.com/secret")
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["logger"] for line in lines] == ["py.warnings", "root", "root"]
    assert all(FORGED in line["traceback"] for line in lines[1:])


def raise_forged() -> None:
    raise ValueError(FORGED)
