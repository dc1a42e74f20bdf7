"""Tests that bulk runs write a map, and a thumbnail for each readable sample."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amd.downstream.embedding.bulk import embed_all
from amd.downstream.embedding.files import read_index
from amd.downstream.embedding.map_files import MAX_THUMBNAIL_BYTES, read_map, read_thumbnail
from amd.downstream.embedding.thumbnails import SIDE, STRIP_FRAMES, encode_thumbnail
from tests.amd.downstream.embedding.test_bulk import ENCODER, config
from tests.amd.downstream.embedding.test_features import write_images
from tests.support.data.damage import overwrite_packets
from tests.support.encoders.published_encoders import VIDEO, film, publish


def opened(content: bytes | None) -> Image.Image:
    assert content is not None
    image = Image.open(io.BytesIO(content))
    assert image.format == "WEBP"
    return image


def thumbnail_of(output: str, record: int) -> bytes | None:
    (span,) = [file.span for file in read_index(output).files if record in file.span]
    return read_thumbnail(output, span, record)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 224, 224, 3), (64, 64)),
        ((1, 224, 112, 3), (32, 64)),
        ((1, 16, 16, 3), (16, 16)),
        ((16, 224, 224, 3), (256, 64)),
        ((2, 32, 48, 3), (96, 32)),
    ],
)
def test_frames_form_a_strip_of_small_pictures(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    content = encode_thumbnail(clip)
    assert opened(content).size == size
    assert len(content) < MAX_THUMBNAIL_BYTES / 2, "noise compresses worst"


def test_the_thumbnail_of_a_still_clip_is_a_single_picture() -> None:
    clip = torch.full((8, 32, 32, 3), 200, dtype=torch.uint8)
    assert opened(encode_thumbnail(clip)).size == (32, 32)
    assert (SIDE, STRIP_FRAMES) == (64, 4)


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_each_thumbnail_shows_its_sample(tmp_path: Path, loader_workers: int) -> None:
    written = write_images(tmp_path / "images", 10)
    files = sorted(written)
    Path(files[6]).write_bytes(b"not an image")
    data = {"train": str(tmp_path / "images"), "loader_workers": loader_workers, "max_bad_fraction": 0.2}
    result = embed_all(config(tmp_path, data=data), local=True)
    assert result.state == "succeeded"
    assert read_index(result.output).thumbnails
    for record, file in enumerate(files):
        content = thumbnail_of(result.output, record)
        if record == 6:
            assert content is None
        else:
            shown = np.asarray(opened(content)).astype(int)
            assert abs(shown.mean() - written[file].mean()) < 8
    found = read_map(result.output)
    assert found.records == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert found.locations == [file for file in files if file != files[6]]
    assert found.labels == [0] * 5 + [1] * 4


def test_intact_and_damaged_videos_have_thumbnail_strips(tmp_path: Path) -> None:
    publish(tmp_path / "encoders" / ENCODER, VIDEO)
    (tmp_path / "images").mkdir()
    videos = [film(tmp_path / "images" / f"{number}.mp4", seed=number, frames=48) for number in range(2)]
    overwrite_packets(videos[1], range(18, 26))
    result = embed_all(config(tmp_path), local=True)
    assert (result.state, result.damaged) == ("succeeded", 1)
    assert [opened(thumbnail_of(result.output, record)).size for record in range(2)] == [(64, 16)] * 2


def test_thumbnails_and_the_map_can_be_omitted(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4)
    result = embed_all(config(tmp_path, thumbnails=False, layout="none"), local=True)
    assert not read_index(result.output).thumbnails
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["embeddings", "index.json", "search"]


def test_a_map_is_added_to_a_complete_set_without_changing_its_other_files(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    output = embed_all(config(tmp_path, thumbnails=False, layout="none"), local=True).output
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    assert embed_all(config(tmp_path, clusters=3), local=True).state == "succeeded"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (read_map(output).layout, read_map(output).clusters) == ("pca", 3)
    embed_all(config(tmp_path, clusters=2), local=True)
    assert read_map(output).clusters == 2
    (tmp_path / "out" / "map.json").write_text("{")
    embed_all(config(tmp_path, clusters=2), local=True)
    assert read_map(output).samples == 6


def test_an_interrupted_run_without_thumbnails_is_completed_with_them(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    output = embed_all(config(tmp_path, thumbnails=False), local=True).output
    (tmp_path / "out" / "index.json").unlink()
    embed_all(config(tmp_path), local=True)
    assert all(thumbnail_of(output, record) for record in range(6))
