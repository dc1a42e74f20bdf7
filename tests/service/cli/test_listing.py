"""Tests for the `--output`, `--json` and `--watch` options of list commands."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import typer
import yaml

from service.cli import listing
from service.cli.listing import Listing, chosen_format, print_list
from service.cli.main import app
from service.cli.tables import Column

ROWS: Listing[dict[str, Any]] = Listing(
    columns=(Column("id", lambda row: row["id"]),), empty="no rows", record=dict, footnote=lambda rows: "a note"
)


def test_a_list_is_printed_as_a_table_json_or_yaml(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": "first", "hidden": "größer"}]
    for output, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        print_list(ROWS, lambda: rows, output, watch=False)  # type: ignore[arg-type]
        assert read(capfd.readouterr().out) == rows
    print_list(ROWS, lambda: rows, "table", watch=False)
    assert [line.strip() for line in capfd.readouterr().out.splitlines()] == ["id", "first", "a note"]


def test_an_empty_list_is_printed_as_a_sentence_or_an_empty_document(capfd: pytest.CaptureFixture[str]) -> None:
    for output, text in (("table", "no rows"), ("json", "[]"), ("yaml", "[]")):
        print_list(ROWS, list, output, watch=False)  # type: ignore[arg-type]
        assert capfd.readouterr().out.strip() == text


def test_the_json_option_is_short_for_output_json() -> None:
    from amd.config import ConfigError

    assert chosen_format("table", True) == chosen_format("json", True) == chosen_format("json", False) == "json"
    with pytest.raises(ConfigError, match="pass only one"):
        chosen_format("yaml", True)


@pytest.mark.parametrize("output", ["table", "json", "yaml"])
def test_a_watched_list_is_printed_on_every_change_until_ctrl_c(
    output: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "WATCH_INTERVAL_S", 0.0)
    states = iter([["a"], ["a"], ["b"]])

    def fetch() -> Sequence[dict[str, Any]]:
        try:
            return [{"id": id} for id in next(states)]
        except StopIteration:
            raise KeyboardInterrupt from None

    print_list(ROWS, fetch, output, watch=True)
    out = capfd.readouterr().out
    expected = {"json": '[{"id": "a"}]\n[{"id": "b"}]\n', "yaml": "- id: a\n---\n- id: b\n"}
    if output in expected:
        assert out == expected[output]
    else:
        assert [line.strip() for line in out.splitlines()] == ["id", "a", "a note", "id", "b", "a note"]


def test_a_watched_table_is_updated_in_place_on_a_terminal() -> None:
    code = (
        "from service.cli import listing\n"
        "from service.cli.tables import Column\n"
        "listing.WATCH_INTERVAL_S = 0.0\n"
        "rows = listing.Listing(columns=(Column('id', str),), empty='', record=dict)\n"
        "states = iter([['one'], ['two']])\n"
        "def fetch():\n"
        "    found = next(states, None)\n"
        "    if found is None: raise KeyboardInterrupt\n"
        "    return found\n"
        "listing.print_list(rows, fetch, 'table', True)\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the terminal was closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0
    assert b"one" in shown
    assert b"\x1b[1A" in shown[: shown.index(b"two")], "the cursor moves up before the second table"


@pytest.mark.parametrize("args", [("--json",), ("-o", "json"), ("--output=json",)])
def test_bad_input_is_also_reported_as_json(args: tuple[str, ...], amd: Any) -> None:
    code, out, err = amd("jobs", "list", "--label", "odd", *args)
    assert (code, json.loads(out)["state"]) == (2, "invalid")
    assert "must have the form KEY=VALUE" in err


def commands(group: Any, path: str = "amd") -> dict[str, Any]:
    found = {}
    for name, command in group.commands.items():
        full = f"{path} {name}"
        found |= commands(command, full) if hasattr(command, "commands") else {full: command}
    return found


LISTS = {
    "amd jobs list",
    "amd encoders list",
    "amd encoders aliases",
    "amd encoders deployments",
    "amd deployments list",
    "amd deployments revisions",
    "amd contexts list",
    "amd keys list",
    "amd projects list",
    "amd webhooks list",
    "amd webhooks deliveries",
}


def test_every_list_command_has_the_three_options() -> None:
    found = commands(typer.main.get_command(app))
    with_watch = {
        name for name, command in found.items() if "--watch" in {opt for p in command.params for opt in p.opts}
    }
    assert with_watch == LISTS
    for name in LISTS:
        options = {opt for parameter in found[name].params for opt in parameter.opts}
        assert {"--output", "-o", "--watch", "-w", "--json"} <= options
