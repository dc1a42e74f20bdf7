"""Tests for `amd doctor`, with and without a running control plane."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from sqlalchemy.exc import OperationalError

from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]


def test_a_healthy_service_is_diagnosed_without_errors(service: Server, amd: Command) -> None:
    code, out, _ = amd("doctor", "--output", "json")
    findings = {finding["check"]: finding for finding in json.loads(out)}
    errors = {check for check, finding in findings.items() if finding["severity"] == "error"}
    assert (code, errors) == ((1, errors) if errors else (0, set()))
    assert not errors - {"disk-data", "disk-ray", "disk-storage", "shared-memory"}, "only this machine may cause errors"
    assert service.url in findings["service"]["message"]
    assert all(len(line) <= 80 for line in amd("doctor")[1].splitlines())


def test_a_service_that_does_not_respond_is_an_error_with_a_remedy(
    amd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMD_URL", "http://127.0.0.1:1")
    code, out, _ = amd("doctor", "--json")
    first = json.loads(out)[0]
    assert (code, first["check"], first["severity"]) == (1, "service", "error")
    assert "amd up" in first["remedy"]
    monkeypatch.delenv("AMD_URL")
    assert "no service found" in json.loads(amd("doctor", "--json")[1])[0]["message"]


def test_readiness_is_reported_if_the_service_cannot_run_its_checks(
    service: Server, amd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OperationalError("SELECT", {}, OSError("no route to host"))

    monkeypatch.setattr("service.operations.doctor.routes.run_checks", fail)
    code, out, _ = amd("doctor", "--json")
    findings = {finding["check"]: finding["severity"] for finding in json.loads(out)}
    assert (code, findings["service"]) == (1, "error")
    assert {"database", "storage", "ray", "reconciler"} <= findings.keys()


def test_a_key_without_the_admin_scope_is_rejected(
    service: Server, amd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMD_KEY", amd("keys", "create", "reader")[1].strip())
    code, _, err = amd("doctor")
    assert code == 1
    assert "admin" in err
