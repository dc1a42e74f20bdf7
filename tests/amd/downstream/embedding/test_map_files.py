"""Tests that map files are read as written, and that files with invalid content are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amd.downstream.embedding import map_files
from amd.downstream.embedding.map_files import (
    MAX_THUMBNAIL_BYTES,
    DamagedMap,
    EmbeddingMap,
    map_url,
    read_map,
    read_thumbnail,
    thumbnails_url,
    write_map,
    write_thumbnails,
)

SPAN = range(4, 8)
IMAGES = {number: b"RIFF0000WEBP" + bytes(number) for number in (4, 5, 7)}


def small_map(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "encoder": "small",
        "layout": "pca",
        "requested_layout": "pca",
        "samples": 3,
        "clusters": 2,
        "explained_variance": [0.5, 0.25],
        "records": [0, 1, 2],
        "locations": ["a", "b", "c"],
        "labels": [1, None, 0],
        "x": [0.0, 1.0, 2.0],
        "y": [0.5, 0.5, 0.5],
        "cluster": [0, 1, 1],
        "score": [1.0, 0.9, 0.8],
    }
    return {**values, **changes}


def test_thumbnails_are_read_as_written(tmp_path: Path) -> None:
    write_thumbnails(str(tmp_path), SPAN, IMAGES)
    assert {record: read_thumbnail(str(tmp_path), SPAN, record) for record in SPAN} == {**IMAGES, 6: None}


@pytest.mark.parametrize(
    ("offsets", "content"),
    [
        ([40, 40 + MAX_THUMBNAIL_BYTES + 1, 0, 0, 0], b"RIFF0000WEBP" * 9000),
        ([40, 52, 0, 0, 0], b"<script>alert(1)"),
        ([40, 52, 0, 0, 0], b"RIFF"),  # shorter than its offsets state
        ([-40, 52, 0, 0, 0], b"RIFF0000WEBP"),
        ([52, 40, 0, 0, 0], b"RIFF0000WEBP"),
        ([2**60, 2**60 + 12, 0, 0, 0], b""),
        ([40], b""),
    ],
    ids=["too large", "not an image", "truncated", "negative", "reversed", "beyond the end", "no offsets"],
)
def test_damaged_thumbnails_are_rejected(tmp_path: Path, offsets: list[int], content: bytes) -> None:
    path = Path(thumbnails_url(str(tmp_path), SPAN))
    path.parent.mkdir()
    path.write_bytes(np.array(offsets, "<i8").tobytes() + content)
    with pytest.raises(DamagedMap, match=r"0000000004-0000000008\.bin is damaged"):
        read_thumbnail(str(tmp_path), SPAN, 4)


def test_missing_files_raise_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_thumbnail(str(tmp_path), SPAN, 4)
    with pytest.raises(FileNotFoundError):
        read_map(str(tmp_path))


def test_a_map_is_read_as_written(tmp_path: Path) -> None:
    written = EmbeddingMap.model_validate(small_map())
    write_map(str(tmp_path), written)
    assert read_map(str(tmp_path)) == written


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"labels": ["<script>", 1, 0]}, "labels"),
        ({"x": [0.0, float("nan"), 1.0]}, r"x\.1"),
        ({"y": [0.0, float("inf"), 1.0]}, r"y\.1"),
        ({"locations": ["a", "b", "x" * 201]}, r"locations\.2"),
        ({"cluster": [0, 1, 64]}, r"cluster\.2"),
        ({"records": [0, 1, -2]}, r"records\.2"),
        ({"score": [1.0, 1.0]}, "different number"),
        ({"layout": "<img>"}, "layout"),
        ({"records": [0] * 50_001}, "records"),
    ],
)
def test_invalid_maps_are_rejected(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    Path(map_url(str(tmp_path))).write_text(json.dumps(small_map(**changes)))
    with pytest.raises(DamagedMap, match=problem):
        read_map(str(tmp_path))


def test_maps_that_are_too_large_or_not_json_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(map_url(str(tmp_path))).write_text(json.dumps(small_map()))
    monkeypatch.setattr(map_files, "MAX_MAP_BYTES", 100)
    with pytest.raises(DamagedMap, match="is larger than 100 bytes"):
        read_map(str(tmp_path))
    Path(map_url(str(tmp_path))).write_text("not JSON")
    with pytest.raises(DamagedMap, match="its content"):
        read_map(str(tmp_path))
