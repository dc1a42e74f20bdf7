"""Read a run's metrics from its JSONL chunks. Torch-free, so that the service can import it.

A chunk is written once and never changed, so any object store works and readers may cache it. A run that resumes
from an older checkpoint repeats steps in a later chunk.
"""

from __future__ import annotations

import json
from typing import Any

from amd.storage import join, listdir, read_bytes

Line = dict[str, Any]  # {"step": …, "epoch": …, "time": …, "loss/total": …, …}


def read_metrics(run_folder: str) -> list[Line]:
    """Return a run's metrics as one line per step; values in later chunks override those in earlier ones."""
    lines: dict[int, Line] = {}
    for name in chunk_names(run_folder):
        for text in read_bytes(join(run_folder, "metrics", name)).decode().splitlines():
            line = json.loads(text)
            lines[line["step"]] = lines.get(line["step"], {}) | line
    return [lines[step] for step in sorted(lines)]


def chunk_names(run_folder: str) -> list[str]:
    """Return the file names of a run's metrics chunks."""
    return [name for name in listdir(join(run_folder, "metrics")) if name.endswith(".jsonl")]
