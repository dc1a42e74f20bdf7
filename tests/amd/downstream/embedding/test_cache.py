from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from amd.config import ClipConfig
from amd.downstream.embedding.cache import FeatureKey, Part, cached_parts, spans, write_parts
from amd.storage import join, listdir, read_json


def key(**changes: object) -> FeatureKey:
    values = {
        "encoder": "e",
        "data": "/data/train",
        "digest": "d",
        "clip": ClipConfig(),
        "interpolation": "bilinear",
        "center_fraction": 1.0,
        "pooling": "mean",
        "precision": "fp32",
    }
    return FeatureKey.model_validate({**values, **changes})


def some_parts() -> list[Part]:
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    bad = {"record": 5, "location": "/data/train/5.png", "reason": "is not an image"}
    damaged = {"record": 2, "location": "/data/train/2.mp4", "reason": "3 of 20 packets do not decode"}
    return [  # in any order; record 5 could not be read
        Part(4, values[4:6], np.array([4, 6]), [bad], []),
        Part(0, values[:4], np.arange(4), [], [damaged]),
    ]


def never() -> Iterator[Part]:
    raise AssertionError("features are computed again")


def same(found: list[Part], expected: list[Part]) -> bool:
    found, expected = (sorted(parts, key=lambda part: part.start) for parts in (found, expected))
    return len(found) == len(expected) and all(
        a.start == b.start
        and (a.bad, a.damaged) == (b.bad, b.damaged)
        and np.array_equal(a.values, b.values)
        and np.array_equal(a.records, b.records)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("remote", [False, True])
def test_features_are_computed_once_and_then_read_from_the_cache(
    remote: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue("s3_root") if remote else str(tmp_path)
    folder = key().folder(root)
    assert same(list(cached_parts(folder, key(), some_parts)), some_parts())
    assert same(list(cached_parts(folder, key(), never)), some_parts())
    manifest = read_json(join(folder, "manifest.json"))
    assert FeatureKey.model_validate(manifest["key"]) == key()
    left_out = [bad for entry in manifest["files"].values() for bad in entry["left_out"]]
    assert left_out == some_parts()[0].bad


def test_files_left_by_an_interrupted_writer_are_not_read(tmp_path: Path) -> None:
    folder = key().folder(str(tmp_path))
    writer = write_parts(folder, key(), some_parts())
    next(writer)
    writer.close()  # as on Ctrl-C
    assert listdir(folder) == ["rows-00000004.safetensors"]
    assert same(list(cached_parts(folder, key(), some_parts)), some_parts())
    assert same(list(cached_parts(folder, key(), never)), some_parts())


@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_damaged_features_are_logged_and_computed_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = key().folder(str(tmp_path))
    list(cached_parts(folder, key(), some_parts))
    file = Path(folder) / "rows-00000004.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data if damage == "change" else data[:20])
    with caplog.at_level(logging.WARNING):
        again = list(cached_parts(folder, key(), some_parts))
    assert "rows-00000004.safetensors" in caplog.text
    assert same(again[-2:], some_parts())  # parts read before the damaged one are computed again
    assert same(list(cached_parts(folder, key(), never)), some_parts())


@pytest.mark.parametrize(
    "manifest",
    ["", '{"fi', "[]", "{}", '{"files": []}', '{"files": {"rows-00000000": 1}}', '{"files": {"x": {"sha256": "0"}}}'],
)
def test_features_with_a_damaged_manifest_are_computed_again(manifest: str, tmp_path: Path) -> None:
    folder = key().folder(str(tmp_path))
    list(cached_parts(folder, key(), some_parts))
    (Path(folder) / "manifest.json").write_text(manifest)
    assert same(list(cached_parts(folder, key(), some_parts)), some_parts())
    assert same(list(cached_parts(folder, key(), never)), some_parts())


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "other"},
        {"data": "/data/val"},  # two splits may contain the same names and labels
        {"digest": "other"},
        {"clip": ClipConfig(sampling_rate_frames=2)},
        {"interpolation": "bicubic"},
        {"center_fraction": 0.875},
        {"pooling": "class_token"},
        {"precision": "bf16"},
        {"views": "2x3"},
    ],
)
def test_everything_that_determines_features_is_part_of_the_key(change: dict[str, object]) -> None:
    assert key(**change).folder("/root") != key().folder("/root")
    assert set(FeatureKey.model_fields) == {
        *("version", "encoder", "data", "digest", "clip"),
        *("interpolation", "center_fraction", "pooling", "precision", "views"),
    }


def test_spans_cover_every_record_once() -> None:
    for records in (1, 4095, 4096, 4097, 20_000):
        assert [number for span in spans(records) for number in span] == list(range(records))
