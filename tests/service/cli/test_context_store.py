"""Tests for the context file: its contents, errors and permissions."""

from __future__ import annotations

from pathlib import Path

import pytest

from amd.config import ConfigError
from service.cli.context_store import ContextFile, ServiceContext, contexts_path, read_contexts, write_contexts

CONTEXT = ServiceContext(url="https://amd.example.com", key="secret")


def test_contexts_survive_a_round_trip(context_file: Path) -> None:
    contexts = ContextFile().with_context("prod", CONTEXT)
    write_contexts(contexts)
    assert read_contexts() == contexts
    assert [path.name for path in context_file.parent.iterdir()] == [context_file.name]


def test_rewriting_the_file_restores_its_permissions(context_file: Path) -> None:
    write_contexts(ContextFile())
    context_file.chmod(0o644)
    write_contexts(ContextFile().with_context("prod", CONTEXT))
    assert context_file.stat().st_mode & 0o777 == 0o600


def test_removing_the_current_context_leaves_no_current_context() -> None:
    contexts = ContextFile().with_context("one", CONTEXT).with_context("two", CONTEXT)
    assert contexts.current == "two"
    assert contexts.without("one").current == "two"
    assert contexts.without("two").current is None


@pytest.mark.parametrize("text", ["contexts: [", "contexts: {a: {url: x, key: [secret]}}", "other: secret"])
def test_an_invalid_file_is_reported_without_its_keys(text: str, context_file: Path) -> None:
    context_file.parent.mkdir()
    context_file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_contexts()
    assert str(context_file) in str(raised.value)
    assert "secret" not in str(raised.value)


def test_an_unwritable_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AMD_CONFIG", str(tmp_path / "file" / "contexts.yaml"))
    with pytest.raises(ConfigError, match="cannot be written"):
        write_contexts(ContextFile())


def test_the_file_is_in_the_users_configuration_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMD_CONFIG")
    assert contexts_path().parts[-2:] == ("amd", "contexts.yaml")
