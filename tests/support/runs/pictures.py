"""Helpers that write the pictures of a run, in the layout that training uses."""

from __future__ import annotations

import io

from PIL import Image

from amd.storage import join, write_bytes
from amd.training.reporting.media_files import PICTURES, step_url
from amd.training.run_folder import run_folder


def webp(colour: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    """Return a plain WebP image."""
    file = io.BytesIO()
    Image.new("RGB", (64, 8), colour).save(file, "WEBP", lossless=True)
    return file.getvalue()


def write_pictures(root: str, job_id: str, steps: tuple[int, ...]) -> None:
    """Write pictures for these steps, each in a different shade."""
    for number, step in enumerate(steps, start=1):
        for index, name in enumerate(PICTURES):
            content = webp((number * 20 % 256, index * 80, 0))
            write_bytes(join(step_url(run_folder(root, job_id), step), name), content)
