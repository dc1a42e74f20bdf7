"""Tests for how a command selects its service: by option, environment, context or local stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from amd.config import ConfigError
from service.cli.connection import (
    configured_target,
    default_project,
    selected_context,
    service_target,
)
from service.cli.context_store import ContextFile, ServiceContext, write_contexts


class LocalStack(NamedTuple):
    url: str
    key_file: Path
    data_dir: Path


@pytest.fixture(autouse=True)
def contexts() -> Iterator[None]:
    token = selected_context.set(None)
    one = ServiceContext(url="https://one", key="key one", project="video")
    two = ServiceContext(url="https://two", key="key two")
    write_contexts(ContextFile().with_context("two", two).with_context("one", one))
    yield
    selected_context.reset(token)


def test_the_current_context_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert service_target() == ("https://one", "key one", "video", "context one")
    assert str(service_target()) == "https://one (context one)"


def test_each_source_takes_precedence_over_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_CONTEXT", "two")
    assert service_target() == ("https://two", "key two", None, "context two")
    monkeypatch.setenv("AMD_URL", "https://environment")
    assert service_target() == ("https://environment", None, None, "AMD_URL"), (
        "the key of a context is not sent elsewhere"
    )
    monkeypatch.setenv("AMD_KEY", "environment key")
    assert service_target() == ("https://environment", "environment key", None, "AMD_URL")
    selected_context.set("one")
    assert service_target() == ("https://one", "key one", "video", "context one")


def test_a_key_in_the_environment_overrides_the_key_of_the_current_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("file key\n")
    monkeypatch.setenv("AMD_KEY_FILE", str(tmp_path / "key"))
    assert service_target().key == "file key"
    monkeypatch.setenv("AMD_KEY", "environment key")
    assert service_target()[:2] == ("https://one", "environment key")


def test_the_local_stack_is_used_if_there_is_no_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_contexts(ContextFile())
    (tmp_path / "key").write_text("stack key\n")
    stack = LocalStack("http://127.0.0.1:8400", tmp_path / "key", tmp_path)
    monkeypatch.setattr("service.stack.find_stack", lambda: stack)
    assert service_target() == ("http://127.0.0.1:8400", "stack key", None, f"amd up, {tmp_path}")
    assert configured_target() is None, "encoders are still read from the storage root"


def test_the_error_for_a_missing_service_lists_the_ways_to_select_one(capfd: pytest.CaptureFixture[str]) -> None:
    write_contexts(ContextFile())
    with pytest.raises(typer.Exit):
        service_target()
    err = capfd.readouterr().err
    assert all(text in err for text in ("amd up", "amd login", "AMD_URL"))


def test_an_unknown_context_is_rejected_with_a_list_of_existing_contexts() -> None:
    selected_context.set("three")
    with pytest.raises(ConfigError, match="existing contexts: two, one"):
        service_target()


def test_an_unreadable_key_file_is_reported(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    write_contexts(ContextFile().with_context("one", ServiceContext(url="https://one", key_file="/nowhere/key")))
    with pytest.raises(typer.Exit):
        service_target()
    assert "/nowhere/key: cannot be read" in capfd.readouterr().err


def test_the_context_sets_the_default_project(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (default_project(None), default_project("other")) == ("video", "other")
    monkeypatch.setenv("AMD_URL", "https://environment")
    assert default_project(None) is None
