"""Tests that the public surface matches its recording: REST, commands, configs and names.

Every change to the surface needs an entry in CHANGELOG.md.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.surface import FAILED, GOLDEN, REPOSITORY, WRITE

SHOWN = 200  # maximum number of changed lines in a message


@pytest.fixture(scope="module")
def surface() -> dict[str, list[str]]:
    """Collect the surface in a separate process, because collecting it imports Ray and changes the environment."""
    command = [sys.executable, "-m", "tests.support.surface"]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr[-5000:]
    found: dict[str, list[str]] = json.loads(completed.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.txt")))
def test_the_public_surface_matches_its_recording(name: str, surface: dict[str, list[str]]) -> None:
    recorded = (GOLDEN / name).read_text().splitlines()
    assert surface[name][:1] != [FAILED], "\n".join(surface[name])
    removed, added = set(recorded) - set(surface[name]), set(surface[name]) - set(recorded)
    changes = [f"- {line}" for line in removed] + [f"+ {line}" for line in added]
    changes.sort(key=lambda change: change[2:])  # the old and the new form of a line are adjacent
    assert not changes, (
        f"tests/golden/surface/{name} differs (- recorded, + current):\n"
        + "\n".join(changes[:SHOWN])
        + ("\n…" if len(changes) > SHOWN else "")
        + f"\nIf the change is intended, describe it in CHANGELOG.md and run `{WRITE}`."
    )


def test_every_part_of_the_public_surface_is_recorded(surface: dict[str, list[str]]) -> None:
    assert sorted(surface) == sorted(path.name for path in GOLDEN.glob("*.txt"))
