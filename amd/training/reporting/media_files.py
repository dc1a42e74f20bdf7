"""Picture files that a run writes, such as media/step-00000120/input.webp. Imports neither torch nor Ray."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from amd.storage import files, join, read_bytes
from amd.training.checkpoints.listing import checkpoint_url

MEDIA = "media"
PictureName = Literal["input.webp", "student.webp", "rebuilt.webp"]
"""Names of a step's files: the samples, the student-visible tokens, and the reconstruction."""
PICTURES: tuple[PictureName, ...] = get_args(PictureName)
MAX_STEPS = 20  # maximum number of steps per run for which pictures are kept
MAX_BYTES = 2**20  # per file

_FILE = re.compile(r"step-(\d{8,15})/([a-z]+\.webp)")


class MediaStep(NamedTuple):
    """Pictures stored for one step."""

    step: int
    sizes: dict[str, int]
    """Size of each file in bytes, by name."""


class DamagedPicture(Exception):
    """Raised for a file that is too large or not a WebP image."""


def media_folder(run_folder: str) -> str:
    return join(run_folder, MEDIA)


def step_url(run_folder: str, step: int) -> str:
    return checkpoint_url(media_folder(run_folder), step)


def media_steps(run_folder: str) -> list[MediaStep]:
    """Return the steps whose pictures are all stored, ascending.

    Sends one list request. Raises StorageUnreachable without retrying.
    """
    sizes: dict[int, dict[str, int]] = {}
    for path, facts in files(media_folder(run_folder)).items():
        found = _FILE.fullmatch(path)
        if found is not None and found[2] in PICTURES:
            sizes.setdefault(int(found[1]), {})[found[2]] = facts.size
    return [MediaStep(step, sizes[step]) for step in sorted(sizes) if len(sizes[step]) == len(PICTURES)]


def read_picture(run_folder: str, step: int, name: PictureName) -> bytes:
    """Read one picture. Raises FileNotFoundError if it does not exist, or DamagedPicture if it is unusable."""
    url = step_url(run_folder, step)
    facts = files(url).get(name)
    if facts is None:
        raise FileNotFoundError(join(url, name))
    if facts.size > MAX_BYTES:
        raise DamagedPicture(f"{join(url, name)}: {facts.size} bytes exceed the limit of {MAX_BYTES}")
    content = read_bytes(join(url, name))
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        raise DamagedPicture(f"{join(url, name)}: not a WebP image")
    return content


def evenly_spaced(steps: Sequence[int], limit: int = MAX_STEPS) -> list[int]:
    """Return at most `limit` of the steps, evenly spaced by index, including the first and the last."""
    if len(steps) <= limit:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)]
