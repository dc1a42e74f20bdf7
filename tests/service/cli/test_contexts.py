"""Tests for `amd login`, `amd logout` and `amd contexts` against a real control plane."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from service.cli.context_store import ContextFile, ServiceContext, read_contexts, write_contexts
from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def key_file(server: Server, tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(f"{server.key}\n")
    return path


def test_a_stored_login_is_readable_only_by_its_owner_and_is_used_by_other_commands(
    server: Server, key_file: Path, context_file: Path, amd: Command
) -> None:
    code, out, _ = amd("login", server.url, "--key-file", key_file, "--name", "prod", "--project", "video")
    assert code == 0
    assert f"logged in to {server.url}; context prod" in out
    assert context_file.stat().st_mode & 0o777 == 0o600
    assert context_file.parent.stat().st_mode & 0o777 == 0o700
    assert yaml.safe_load(context_file.read_text()) == {
        "current": "prod",
        "contexts": {"prod": {"url": server.url, "key_file": str(key_file), "project": "video"}},
    }
    code, out, err = amd("jobs", "list")
    assert (code, out.strip(), err.strip()) == (0, "no jobs", f"{server.url} (context prod)")
    assert server.key not in "".join(amd("contexts")[1:])
    assert server.key not in "".join(amd("contexts", "list", "--json")[1:])


def test_a_key_can_be_piped_in_and_is_never_printed(
    server: Server, amd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{server.key}\n"))
    code, out, err = amd("login", f"{server.url}/", "--json")
    assert (code, json.loads(out)["name"]) == (0, "local")
    assert read_contexts().get("local") == ServiceContext(url=server.url, key=server.key)
    assert server.key not in out + err + repr(read_contexts())
    assert server.key not in "".join(amd("contexts", "-o", "yaml")[1:])
    assert amd("jobs", "list")[0] == 0


@pytest.mark.parametrize(("key", "code"), [("amd_0_wrong", 1), ("", 2)])
def test_a_rejected_login_stores_nothing(
    key: str, code: int, server: Server, context_file: Path, amd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(key))
    assert amd("login", server.url)[0] == code
    assert not context_file.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("login", "amd.example.com"), "must be the URL of a service"),
        (("login", "https://amd.example.com", "--name", "a b"), "--name a b: must start with a letter"),
        (("contexts", "use", "nothing"), "context 'nothing': does not exist; existing contexts: none"),
        (("logout",), "no current context"),
        (("jobs", "list", "--context", "nothing"), "context 'nothing'"),
    ],
)
def test_bad_input_exits_with_code_2(args: tuple[str, ...], message: str, amd: Command) -> None:
    code, _, err = amd(*args)
    assert (code, message in err) == (2, True)


def test_login_without_a_url_or_a_stack_explains_how_to_start_one(amd: Command) -> None:
    code, _, err = amd("login")
    assert code == 1
    assert "amd up" in err


def test_contexts_can_be_listed_selected_and_deleted(amd: Command) -> None:
    first, second = (
        ServiceContext(url="https://one.example.com", key="k"),
        ServiceContext(url="https://two.example.com"),
    )
    write_contexts(ContextFile().with_context("one", first).with_context("two", second))
    code, out, _ = amd("contexts")
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["one", "https://one.example.com", "stored"],
        ["*", "two", "https://two.example.com"],
    ]
    assert amd("contexts", "use", "one")[0] == 0
    assert read_contexts().current == "one"
    code, out, _ = amd("logout", "--json")
    assert (code, json.loads(out)) == (0, {"deleted": "one", "current": None})
    assert list(read_contexts().contexts) == ["two"]


def test_a_variable_that_overrides_the_context_is_reported(amd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    write_contexts(ContextFile().with_context("one", ServiceContext(url="https://one.example.com")))
    monkeypatch.setenv("AMD_URL", "https://two.example.com")
    assert "AMD_URL is set" in amd("contexts", "use", "one")[2]
