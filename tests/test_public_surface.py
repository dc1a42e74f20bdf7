"""What others rely on stays as it was: REST, command, configs, names. A change here is a line in CHANGELOG.md."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.surface import FAILED, GOLDEN, REPOSITORY, WRITE

SHOWN = 200  # lines of a difference


@pytest.fixture(scope="module")
def surface() -> dict[str, list[str]]:
    """Collected in a process of its own, which imports Ray and changes the environment."""
    command = [sys.executable, "-m", "tests.support.surface"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-5000:]
    found: dict[str, list[str]] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.txt")))
def test_the_public_surface_is_as_recorded(name: str, surface: dict[str, list[str]]) -> None:
    recorded = (GOLDEN / name).read_text().splitlines()
    assert surface[name][:1] != [FAILED], "\n".join(surface[name])
    removed, added = set(recorded) - set(surface[name]), set(surface[name]) - set(recorded)
    changes = [f"- {line}" for line in removed] + [f"+ {line}" for line in added]
    changes.sort(key=lambda change: change[2:])  # what was and what is, below each other
    assert not changes, (
        f"tests/golden/surface/{name} differs (- recorded, + now):\n"
        + "\n".join(changes[:SHOWN])
        + ("\n…" if len(changes) > SHOWN else "")
        + f"\nIf the change is intended, describe it in CHANGELOG.md and run `{WRITE}`. Additions are free."
    )


def test_every_part_of_the_public_surface_is_recorded(surface: dict[str, list[str]]) -> None:
    assert sorted(surface) == sorted(path.name for path in GOLDEN.glob("*.txt"))
