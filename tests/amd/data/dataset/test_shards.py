"""Tests for tar shards: patterns, indexes, labels and errors."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from amd.config import DataConfig
from amd.data.dataset import shards
from amd.data.dataset.open import Manifest, ManifestError, open_manifest
from amd.data.dataset.shards import INDEX_SUFFIX, ShardWriter, expand, shard_members, write_index
from amd.data.decoding.reader import BadSample, SampleReader
from amd.data.fetching.fetch import Fetcher, FetchError
from amd.storage import write_bytes


def _png(value: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def _tar(path: Path, members: dict[str, bytes], mode: str = "w:") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _samples(start: int, count: int) -> dict[str, bytes]:
    members = {}
    for n in range(start, start + count):
        members[f"{n:06d}.png"] = _png(n)
        members[f"{n:06d}.cls"] = str(n % 3).encode()
    return members


def _open(url: Path | str) -> Manifest:
    return open_manifest(DataConfig(train=str(url)))


def _values(manifest: Manifest) -> list[int]:
    reader = SampleReader(DataConfig(train="x"))
    values = [int(reader.read_clip(record, np.arange)[0, 0, 0, 0]) for record in manifest]
    reader.close()
    return values


@pytest.mark.parametrize("url", ["{}", "{}/{{000..002}}.tar", "{}/*.tar", "{}/00[0-2].tar"])
def test_folders_globs_and_brace_patterns_open_the_same_samples(url: str, tmp_path: Path) -> None:
    for n in range(3):
        _tar(tmp_path / f"{n:03d}.tar", _samples(4 * n, 4))
    manifest = _open(url.format(tmp_path))
    assert _values(manifest) == list(range(12))
    assert manifest.labels.tolist() == [n % 3 for n in range(12)]
    assert manifest[5].name == f"{tmp_path}/001.tar::000005.png"


def test_brace_patterns_keep_leading_zeros_and_can_be_combined() -> None:
    assert expand("s3://b/{08..11}.tar") == [f"s3://b/{n:02d}.tar" for n in range(8, 12)]
    assert expand("s3://b/{9..10}-{0..1}.tar") == [f"s3://b/{a}-{b}.tar" for a in (9, 10) for b in (0, 1)]


def test_long_names_and_nested_folders_are_read(tmp_path: Path) -> None:
    name = "deep/" * 40 + "a b.png"
    manifest = _open(_tar(tmp_path / "x.tar", {name: _png(9), name.replace(".png", ".json"): b'{"label": 4}'}))
    assert (manifest[0].member, manifest[0].label) == (name, 4)
    assert _values(manifest) == [9]


def test_json_without_a_label_leaves_a_sample_unlabelled(tmp_path: Path) -> None:
    assert _open(_tar(tmp_path / "x.tar", {"a.png": _png(1), "a.json": b'{"caption": "x"}'}))[0].label is None


def test_an_index_is_used_only_if_it_matches_the_tar(tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar", _samples(0, 3))
    members = shard_members(str(path))
    write_index(str(path), path.stat().st_size, [member._replace(label=9) for member in members])
    assert _open(path).labels.tolist() == [9, 9, 9]
    _tar(path, _samples(0, 30))
    assert len(_open(path)) == 30


def test_scanning_a_written_shard_returns_its_index(tmp_path: Path) -> None:
    writer = ShardWriter()
    writer.add("000000000", ".png", _png(3), 7)
    writer.add("000000001", ".png", _png(4), None)
    content = writer.finish()
    (tmp_path / "x.tar").write_bytes(content)
    assert shard_members(str(tmp_path / "x.tar")) == writer.members
    write_index(str(tmp_path / "x.tar"), len(content), writer.members)
    assert json.loads((tmp_path / f"x.tar{INDEX_SUFFIX}").read_text())["size"] == len(content)
    assert shard_members(str(tmp_path / "x.tar")) == writer.members
    assert _values(_open(tmp_path)) == [3, 4]


def test_only_the_incomplete_sample_of_a_truncated_shard_is_reported(tmp_path: Path) -> None:
    members = {f"{n}.png": _png(n) + bytes(3000) for n in range(3)}
    path = _tar(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[: 512 + 3584 + 512 + 1000])
    manifest = _open(path)
    assert len(manifest) == 2
    reader = SampleReader(DataConfig(train="x"))
    assert reader.read_clip(manifest[0], np.arange).shape == (1, 4, 4, 3)
    with pytest.raises(BadSample, match=r"x.tar::1.png is truncated: \d+ of \d+ bytes"):
        reader.read_clip(manifest[1], np.arange)
    reader.close()


def test_compressed_shards_and_invalid_labels_are_reported_together(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", _samples(0, 2))
    _tar(tmp_path / "b.tar", _samples(0, 2), "w:gz")
    _tar(tmp_path / "c.tar", {"1.png": _png(1), "1.cls": b"cat"})
    with pytest.raises(ManifestError) as error:
        _open(tmp_path)
    assert [tmp_path.joinpath(name).as_posix() in text for name, text in zip("bc", error.value.problems, strict=True)]
    assert "compressed shards do not support random access" in error.value.problems[0]
    assert "c.tar::1.cls has no label" in error.value.problems[1]


def test_shards_on_s3_are_read_by_byte_ranges(s3_root: str, tmp_path: Path) -> None:
    path = _tar(tmp_path / "000.tar", _samples(0, 3))
    write_bytes(f"{s3_root}/set/000.tar", path.read_bytes())
    for url in (f"{s3_root}/set", f"{s3_root}/set/{{000..000}}.tar", f"{s3_root}/set/*.tar"):
        assert _open(url).labels.tolist() == [0, 1, 2]
    assert _values(_open(f"{s3_root}/set")) == [0, 1, 2]
    assert _open(f"{s3_root}/set").digest() == _open(path).digest()


@pytest.mark.parametrize("member", [(-1, 5), (0, -1), (0, 10**15), (10**15, 5), (600, 10**6)])
def test_an_index_whose_members_are_outside_the_tar_is_not_used(member: tuple[int, int], tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", {"a.png": _png(3)})
    scanned = shard_members(str(tar))
    index = {"size": tar.stat().st_size, "members": [["a.png", *member, 0]]}
    Path(f"{tar}{INDEX_SUFFIX}").write_text(json.dumps(index))
    assert shard_members(str(tar)) == scanned


def test_a_label_file_that_is_too_large_to_read_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_LABEL_BYTES", 3)
    with pytest.raises(ManifestError, match=r"a\.cls has 4 bytes, more than 3 for a label file"):
        _open(_tar(tmp_path / "a.tar", {"a.png": _png(3), "a.cls": b"1000"}))


def test_a_member_larger_than_the_remaining_shard_is_reported_as_truncated(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", {"a.png": _png(3)})
    with pytest.raises(FetchError, match=rf"is truncated: {tar.stat().st_size - 512} of {10**15} bytes"):
        Fetcher().fetch(str(tar), 512, 10**15)
    with pytest.raises(FetchError, match="is truncated: 0 of 5 bytes"):
        Fetcher().fetch(str(tar), 10**15, 5)
