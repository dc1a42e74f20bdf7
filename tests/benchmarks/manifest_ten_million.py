"""Measure the time and memory needed to open a list file with ten million lines.

Run as `python tests/benchmarks/manifest_ten_million.py [LINES]`. Writes the list (about 660 MB) to a temporary folder,
opens it as a training run does, and prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from amd.config import DataConfig
from amd.data.dataset.open import open_manifest

LINES = 10_000_000


def main(lines: int = LINES) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.csv"
        with path.open("w") as file:
            for start in range(0, lines, 100_000):
                file.writelines(
                    f"kinetics400/train/class name {n % 400:03d}/clip_{n:012d}_000010.mp4 {n % 400}\n"
                    for n in range(start, min(lines, start + 100_000))
                )
        before = _peak_gb()
        started = time.perf_counter()
        manifest = open_manifest(DataConfig(train=str(path)))
        opened = time.perf_counter() - started
        started = time.perf_counter()
        digest = manifest.digest()
        results = {
            "lines": len(manifest),
            "list_gb": round(path.stat().st_size / 1e9, 2),
            "open_s": round(opened, 1),
            "digest_s": round(time.perf_counter() - started, 1),
            "peak_gb": round(_peak_gb(), 2),
            "peak_before_gb": round(before, 2),
            "digest": digest[:16],
            "last": manifest[lines - 1].location.removeprefix(folder),
        }
    print(json.dumps(results))


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
