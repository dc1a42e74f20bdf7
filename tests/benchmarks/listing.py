"""Count list requests and bytes per rank when a run opens a data set in object storage, with and without sharing.

Run as `python -m tests.benchmarks.listing [RANKS] [FILES]`. A stub filesystem synthesises the listing of FILES files in
1000 class folders, in pages of 1000 keys as S3 sends them; RANKS simulated ranks open it. Before: every rank lists the
data itself; only one rank is measured, because all send the same requests. After: the launcher lists the data once and
stores the manifest, which rank 0 reads and sends to the other ranks. Prints one line of JSON; times exclude the
network.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from amd.config import DataConfig
from amd.data.dataset.manifest_cache import keep_manifests
from amd.data.dataset.open import open_manifest
from amd.storage import join
from amd.training.trainer.open_data import MANIFESTS, open_on_main
from tests.support.data import synthetic_bucket
from tests.support.data.synthetic_bucket import SyntheticBucket

CLASSES = 1000


class SimulatedGroup:
    """Simulates the ranks of a run in one process. Pickles the values that rank 0 sends, and counts their bytes."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.sent_bytes = ranks, 0
        self.digests: set[str] = set()

    def broadcast_from_main(self, make: Any) -> Any:
        content = pickle.dumps(make())
        self.sent_bytes = len(content)
        for _ in range(1, self.ranks):
            self.digests.add(pickle.loads(content).digest())
        return pickle.loads(content)


def main(ranks: int = 32, files: int = 1_300_000) -> None:
    synthetic_bucket.register()
    data = DataConfig(train=f"synthetic://data/{CLASSES}x{files // CLASSES}")
    before = _listed(data)
    with tempfile.TemporaryDirectory() as folder:
        SyntheticBucket.reset()
        with keep_manifests() as manifests:
            started = time.perf_counter()
            digest = open_manifest(data).digest()
            manifests.move_to(join(folder, MANIFESTS))
            launch_s = time.perf_counter() - started
        launch = SyntheticBucket.requests, SyntheticBucket.bytes
        (stored,) = (path.stat().st_size for path in (Path(folder) / MANIFESTS).iterdir())
        SyntheticBucket.reset()
        group = SimulatedGroup(ranks)
        started = time.perf_counter()
        manifest = open_on_main(group, data, folder, open_manifest)  # type: ignore[arg-type]
        open_s = time.perf_counter() - started
    assert {manifest.digest(), *group.digests, before["digest"]} == {digest}
    print(
        json.dumps(
            {
                "ranks": ranks,
                "files": len(manifest),
                "before": {
                    "list_requests_per_rank": before["requests"],
                    "listed_mb_per_rank": round(before["bytes"] / 1e6, 1),
                    "list_requests": before["requests"] * ranks,
                },
                "after": {
                    "list_requests_of_the_launch": launch[0],
                    "listed_mb_of_the_launch": round(launch[1] / 1e6, 1),
                    "stored_mb": round(stored / 1e6, 1),
                    "list_requests_per_rank": SyntheticBucket.requests / ranks,
                    "read_mb_per_rank": round(stored / ranks / 1e6, 2),
                    "sent_mb_per_rank": round(group.sent_bytes / 1e6, 1),
                },
                "list_s": round(before["seconds"], 1),
                "list_and_store_s": round(launch_s, 1),
                "open_on_all_simulated_ranks_s": round(open_s, 1),
            }
        )
    )


def _listed(data: DataConfig) -> dict[str, Any]:
    SyntheticBucket.reset()
    started = time.perf_counter()
    digest = open_manifest(data).digest()
    seconds = time.perf_counter() - started
    return {
        "digest": digest,
        "seconds": seconds,
        "requests": SyntheticBucket.requests,
        "bytes": SyntheticBucket.bytes,
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
