"""Tests for `amd keys` against a real control plane."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]


def test_a_key_is_created_used_listed_and_revoked(
    service: Server, amd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = amd("keys", "create", "ci", "--scope", "submit", "--project", "video", "--expires-in", "30d")
    assert code == 0
    key = out.strip()
    assert key.startswith("amd_")
    assert "scopes submit; project video" in err
    assert key not in err

    (row,) = [row for row in yaml.safe_load(amd("keys", "list", "-o", "yaml")[1]) if row["name"] == "ci"]
    expires = datetime.fromisoformat(row["expires_at"])
    assert timedelta(days=29) < expires - datetime.now(UTC) <= timedelta(days=30)
    admin = service.key
    monkeypatch.setenv("AMD_KEY", key)
    assert amd("jobs", "list")[0] == 0
    assert amd("keys", "list")[0] == 1, "only admins list keys"

    monkeypatch.setenv("AMD_KEY", admin)
    assert amd("keys", "revoke", row["id"][:6])[:2] == (0, f"{row['id']}: revoked\n")
    code, out, err = amd("keys", "list")
    assert f"{service.url} (AMD_URL)" in err
    (line,) = [line for line in out.splitlines() if line.startswith(row["id"])]
    assert "revoked" in line
    monkeypatch.setenv("AMD_KEY", key)
    assert amd("jobs", "list")[0] == 1


def test_json_output_contains_the_key_and_its_fields(service: Server, amd: Command) -> None:
    created = json.loads(amd("keys", "create", "ci", "--json")[1])
    assert created["key"].startswith(f"amd_{created['id']}_")
    assert created["scopes"] == ["read"]


def test_key_tables_fit_in_80_columns_without_truncation(service: Server, amd: Command) -> None:
    name = "a person with a rather long name who uses this key"
    amd("keys", "create", name, "--scope", "admin")
    _, out, _ = amd("keys", "list")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "…" not in out
    assert set(name.split()) <= set(out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("create", "ci", "--scope", "root"), "--scopes: "),
        (("create", "ci", "--expires-in", "soon"), "--expires-in soon: must be a number with the unit h, d or w"),
        (("revoke", "zzz"), "no key 'zzz'; `amd keys list`"),
    ],
)
def test_bad_input_exits_with_code_2(args: tuple[str, ...], message: str, service: Server, amd: Command) -> None:
    code, _, err = amd("keys", *args)
    assert (code, message in err) == (2, True)
