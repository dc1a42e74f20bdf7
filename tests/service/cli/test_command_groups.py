"""Tests for the order of commands, for default commands, and for --context after a command."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.cli.command_groups import _context_first
from service.cli.main import PANELS

Command = Callable[..., tuple[int, str, str]]


def test_help_lists_all_commands_in_order_under_their_headings(amd: Command) -> None:
    code, out, _ = amd("--help")
    assert code == 0
    expected = [name for panel, commands in PANELS.items() for name in (f"─ {panel} ─", *commands)]
    places = [out.find(name if name.startswith("─") else f"\n│ {name} ") for name in expected]
    assert -1 not in places
    assert places == sorted(places)
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("args", "moved"),
    [
        (["jobs", "list", "--context", "a"], ["--context", "a", "jobs", "list"]),
        (["jobs", "list", "--context=a", "-n", "3"], ["--context=a", "jobs", "list", "-n", "3"]),
        (["jobs", "list", "--context"], ["--context", "jobs", "list"]),
        (["train", "--", "--context", "a"], ["train", "--", "--context", "a"]),
        ([], []),
    ],
)
def test_the_context_is_accepted_after_a_command(args: list[str], moved: list[str]) -> None:
    assert _context_first(args) == moved


def test_bash_completion_lists_the_commands(amd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_AMD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "amd webh")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = amd()
    assert (code, out.split()) == (0, ["webhooks"])


def test_help_for_a_group_with_a_default_command_describes_the_group(amd: Command) -> None:
    assert "Make a context the current one" in amd("contexts", "--help")[1]
    assert "no contexts" in amd("contexts")[1]
    assert "Usage" in "".join(amd("search")[1:])
