"""List a run's committed checkpoints by their manifests. Imports neither torch nor Ray."""

from __future__ import annotations

import re

from amd.storage import files, join, listdir

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
_FOLDER = re.compile(r"step-(\d{8,})")
_COMMITTED = re.compile(rf"{_FOLDER.pattern}/{re.escape(MANIFEST)}")


def checkpoint_url(folder: str, step: int) -> str:
    return join(folder, f"step-{step:08d}")


def stored_steps(folder: str) -> list[int]:
    """Return the steps of all checkpoints in a folder, including uncommitted ones."""
    return [int(match[1]) for name in listdir(folder) if (match := _FOLDER.fullmatch(name))]


def committed_steps(folder: str) -> list[int]:
    """Return the steps of the committed checkpoints, ascending."""
    return sorted(step for step in stored_steps(folder) if MANIFEST in listdir(checkpoint_url(folder, step)))


def newest_step(run_folder: str) -> int:
    """Return the step of a run's newest committed checkpoint, or 0 if it has none.

    Sends one list request. Raises StorageUnreachable without retrying.
    """
    names = files(join(run_folder, CHECKPOINTS))
    return max((int(match[1]) for name in names if (match := _COMMITTED.fullmatch(name))), default=0)
