"""Rank 0 opens a run's data, and all ranks get the same manifest or the same error."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from amd.config import ConfigError, DataConfig
from amd.data.dataset.manifest_cache import keep_manifests
from amd.data.dataset.open import open_manifest
from amd.storage import StorageUnreachable
from amd.training.process_group import ProcessGroup
from amd.training.trainer.open_data import MANIFESTS, open_on_main
from tests.amd.data.dataset.test_shards import _png, _tar
from tests.support.data import synthetic_bucket
from tests.support.data.synthetic_bucket import SyntheticBucket
from tests.support.processes import run_ranks
from tests.support.runs.tiny_runs import tiny_images

WORLD = 3


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_error(error: Exception) -> Any:
    raise error


def run_rank(urls: list[str], folder: str, rank: int) -> None:
    """Open each data set on this rank; write the manifests, the errors and the number of list requests to a file."""
    synthetic_bucket.register()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    group = ProcessGroup(rank, WORLD)
    found: list[Any] = []
    for url in urls:
        data = DataConfig(train=url)
        try:
            manifest = open_on_main(group, data, folder, open_manifest)
            found.append((list(manifest), manifest.digest(), manifest.labels.tolist(), manifest.classes))
        except ConfigError as error:
            found.append(error.problems)
    errors = []
    for error in (StorageUnreachable("s3://bucket: away"), Unpicklable(1, 2)):
        try:
            group.broadcast_from_main(lambda error=error: raise_error(error))
        except Exception as raised:
            errors.append((type(raised).__name__, str(raised)))
    Path(f"{folder}/{rank}").write_bytes(pickle.dumps((found, errors, SyntheticBucket.requests)))
    torch.distributed.destroy_process_group()


def test_every_rank_gets_the_same_manifest_or_error_and_only_rank_0_lists_files(tmp_path: Path) -> None:
    images = tiny_images(tmp_path / "images", 7)
    odd = tmp_path / "odd \udcff names"
    odd.mkdir()
    for name in ("été.mp4", "b c.MP4", "\udcfe.mkv"):
        (odd / name).write_bytes(b"")
    (tmp_path / "list.csv").write_text("a b.mp4 3\n/abs/c.mp4 -1\n")
    (tmp_path / "frames.txt").write_text("video 1 12 3\nother 7 0\n")
    _tar(tmp_path / "tars" / "0.tar", {"a.jpg": _png(1), "a.cls": b"5", "b.jpg": _png(2)})
    (tmp_path / "empty").mkdir()
    names = ("list.csv", "frames.txt", "tars", "empty", "missing")
    urls = [str(images), str(odd), *(str(tmp_path / name) for name in names), "synthetic://data/2x1500"]
    assert run_ranks(run_rank, [(urls, str(tmp_path), rank) for rank in range(WORLD)]) == [0] * WORLD

    results = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(WORLD)]
    found, _, requests = results[0]
    assert all(other[0] == found for other in results)
    assert [len(one[0]) for one in found[:5]] == [7, 3, 2, 2, 2]
    assert "empty" in found[5][0]
    assert "does not exist" in found[6][0]
    assert len(found[7][0]) == 3000
    assert requests > 0
    assert [other[2] for other in results[1:]] == [0] * (WORLD - 1)
    for _, raised, _ in results:
        assert raised[0] == ("StorageUnreachable", "s3://bucket: away")
        assert raised[1][1].endswith("1 and 2"), "an error that cannot be pickled is sent as text"


def test_rank_0_loads_the_manifest_stored_at_launch(tmp_path: Path) -> None:
    synthetic_bucket.register()
    data = DataConfig(train="synthetic://data/2x15")
    with keep_manifests() as cache:
        listed = open_manifest(data)
        cache.move_to(str(tmp_path / MANIFESTS))
    SyntheticBucket.reset()
    opened = open_on_main(ProcessGroup(), data, str(tmp_path), open_manifest)
    assert list(opened) == list(listed)
    assert SyntheticBucket.requests == 0
