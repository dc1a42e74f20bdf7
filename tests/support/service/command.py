"""Run the `amd` command in the test's process."""

from __future__ import annotations

import sys

import pytest

from service.cli import main


def amd(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run the command and return (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["amd", *args])
    with pytest.raises(SystemExit) as end:
        main.main()
    printed = capfd.readouterr()
    return int(end.value.code or 0), printed.out, printed.err
