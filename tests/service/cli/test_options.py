"""Tests that a command and the program that its job runs have the same help for the same options."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import typer

import amd.downstream.__main__ as downstream
import amd.training.__main__ as training
from service.cli.main import app


@pytest.mark.parametrize(
    ("command", "program", "args", "options"),
    [
        ("train", training.main, [], {"--preset", "--config", "--local", "--json"}),
        ("finetune", downstream.main, ["finetune"], {"--preset", "--config", "--local", "--json"}),
        ("detect", downstream.main, ["detect"], {"--preset", "--config", "--local", "--json"}),
        ("probe", downstream.main, ["probe"], {"--config"}),
        ("embed", downstream.main, ["embed"], {"--config", "--local"}),
    ],
)
def test_the_program_that_a_job_runs_has_the_same_help_as_the_command(
    command: str,
    program: Callable[[Sequence[str]], int],
    args: list[str],
    options: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    help_of = {name: parameter.help for parameter in found.params for name in parameter.opts if parameter.help}
    with pytest.raises(SystemExit):
        program([*args, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in options:
        assert help_of[option] in shown, option
    if command != "embed":  # which also takes files
        (overrides,) = [parameter.help for parameter in found.params if parameter.name == "overrides"]
        assert overrides in shown
