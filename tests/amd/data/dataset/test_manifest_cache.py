"""Tests for the manifest cache: each data set in a run is listed once, and cached manifests equal the originals."""

from __future__ import annotations

import pickle
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.config import DataConfig
from amd.data.dataset.manifest import Manifest, ManifestError, Names, ShardLocations
from amd.data.dataset.manifest_cache import keep_manifests, manifest_bytes, parse_manifest
from amd.data.dataset.open import open_manifest
from tests.support.data import synthetic_bucket
from tests.support.data.synthetic_bucket import SyntheticBucket

NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(NAMES, min_size=1, max_size=20))
    count = len(names)

    def numbers(low: int, high: int, dtype: type) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), dtype)

    kind = draw(st.sampled_from(["files", "frames", "shards"]))
    urls = ("s3://bucket/a.tar", "/data/\udcff.tar")
    shards = ShardLocations(urls, numbers(0, 1, np.int32), numbers(0, 2**40, np.int64), numbers(0, 2**40, np.int64))
    return Manifest(
        Names.of(names),
        numbers(-1, 2**40, np.int64),
        root=draw(st.sampled_from(["", "/data", "s3://bucket/été \udcff"])),
        frames=numbers(1, 2**31 - 1, np.int32) if kind == "frames" else None,
        shards=shards if kind == "shards" else None,
        classes=draw(st.none() | st.lists(st.text(max_size=5), max_size=3).map(tuple)),
        notes=draw(st.lists(st.text(max_size=5), max_size=2)),
    )


def facts(manifest: Manifest) -> tuple[object, ...]:
    return list(manifest), manifest.digest(), manifest.classes, manifest.notes, manifest.labels.tolist()


@settings(max_examples=40)
@given(manifests())
def test_a_manifest_loaded_from_the_cache_equals_the_original(manifest: Manifest) -> None:
    expected = facts(manifest)
    assert facts(parse_manifest(manifest_bytes(manifest))) == expected
    assert facts(pickle.loads(pickle.dumps(manifest))) == expected


def test_a_remote_folder_is_listed_once_per_call() -> None:
    synthetic_bucket.register()
    SyntheticBucket.reset()
    manifest = open_manifest(DataConfig(train="synthetic://data/3x1200"))
    assert len(manifest) == 3600
    pages = 4
    assert SyntheticBucket.requests <= pages + 3, "the pages of one listing, plus lookups of the folder itself"


def test_data_is_listed_once_while_manifests_are_cached(tmp_path: Path) -> None:
    synthetic_bucket.register()
    data = DataConfig(train="synthetic://data/3x5")
    with keep_manifests() as cache:
        listed = open_manifest(data)
        SyntheticBucket.reset()
        assert open_manifest(data) is listed
        with keep_manifests():
            assert open_manifest(data) is listed, "also in a nested run, such as the teacher's"
        cache.move_to(str(tmp_path / "manifests"))
        assert facts(open_manifest(data)) == facts(listed)
    with keep_manifests(str(tmp_path / "manifests")):
        assert facts(open_manifest(data)) == facts(listed)
        assert SyntheticBucket.requests == 0
        other = open_manifest(DataConfig(train="synthetic://data/3x6"))
        assert len(other) == 18, "data that was not stored is listed"
        assert SyntheticBucket.requests > 0
    SyntheticBucket.reset()
    open_manifest(data)
    assert SyntheticBucket.requests > 0, "nothing is kept after the run"


def test_the_cache_key_includes_the_format_and_root(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 1\n")
    data = DataConfig(train=str(tmp_path / "list.txt"))
    with keep_manifests():
        assert open_manifest(data)[0].location == str(tmp_path / "a.mp4")
        assert open_manifest(data.model_copy(update={"root": "/elsewhere"}))[0].location == "/elsewhere/a.mp4"
        with pytest.raises(ManifestError):
            open_manifest(data.model_copy(update={"format": "image_folder"}))


def test_the_cache_stores_the_members_of_a_tar_without_an_index(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("x.jpg")
        info.size = 5
        tar.addfile(info, BytesIO(b"pixel"))
    data = DataConfig(train=str(tmp_path / "a.tar"))
    with keep_manifests() as cache:
        listed = open_manifest(data)
        cache.move_to(str(tmp_path / "manifests"))
    (tmp_path / "a.tar").unlink()
    with keep_manifests(str(tmp_path / "manifests")):
        assert facts(open_manifest(data)) == facts(listed)


def test_data_is_listed_again_if_a_stored_manifest_is_damaged(tmp_path: Path) -> None:
    synthetic_bucket.register()
    data = DataConfig(train="synthetic://data/3x5")
    with keep_manifests() as cache:
        listed = open_manifest(data)
        cache.move_to(str(tmp_path))
    (path,) = tmp_path.iterdir()
    for damaged in (b"", b"PK", path.read_bytes()[:-40], b"x" * 500):
        path.write_bytes(damaged)
        with keep_manifests(str(tmp_path)):
            assert facts(open_manifest(data)) == facts(listed)
