"""Check results, and a function that runs checks concurrently with a time limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from service.web.bounded_calls import BoundedCalls
from service.web.errors import ServiceError
from service.web.schemas import ApiModel

Severity = Literal["ok", "warning", "error"]


class Finding(ApiModel):
    """Result of one check."""

    check: str
    """Name of the check."""
    severity: Severity
    """Severity: ok, warning (works, but not safely or not for long) or error (does not work)."""
    message: str
    """Description of the state, with the measured values."""
    remedy: str = ""
    """What to do; empty if there is nothing to do."""


class Diagnosis(ApiModel):
    """Results of all checks."""

    version: str
    """Version of the service."""
    findings: list[Finding]


Check = Callable[[], Finding]


def ok(check: str, message: str) -> Finding:
    return Finding(check=check, severity="ok", message=message)


def warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, severity="warning", message=message, remedy=remedy)


def problem(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, severity="error", message=message, remedy=remedy)


def run_checks(checks: Mapping[str, Check], calls: BoundedCalls) -> list[Finding]:
    """Run the checks concurrently. A check that raises or times out is reported as an error. Blocks."""
    results = calls.map_from_thread(lambda check: check(), list(checks.values()))
    return [
        _from_error(name, result) if isinstance(result, Exception) else result
        for name, result in zip(checks, results, strict=True)
    ]


def _from_error(check: str, error: Exception) -> Finding:
    if isinstance(error, ServiceError):
        return problem(check, error.message, "make the dependency respond; `/readyz` reports which one does not")
    first_line = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return problem(check, first_line, "see the message and the control plane's log")
