"""`amd prepare` writes tar shards of small files with short, closed GOPs; interruptions never change the output."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amd.config import ConfigError, DataConfig
from amd.data.dataset.open import ManifestError, open_manifest
from amd.data.dataset.shards import INDEX_SUFFIX
from amd.data.decoding.packets import map_packets
from amd.data.decoding.reader import SampleReader
from amd.data.fetching.fetch import Fetcher
from amd.data.prepare import REPORT, prepare
from amd.storage import listdir, read_json, write_bytes
from tests.support.data.videos import exact_frames, pictures, write_audio_only, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two classes of three clips (30 frames of 96x64) and two unreadable files."""
    folder = tmp_path_factory.mktemp("raw")
    for label in ("run", "walk"):
        (folder / label).mkdir()
        for n in range(3):
            write_video(folder / label / f"{n}.mp4", pictures(30, seed=n), gop=250)
    (folder / "run" / "zero.mp4").write_bytes(b"")
    write_audio_only(folder / "walk" / "sound.mp4")
    return folder


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each visible file; a killed writer may leave a hidden temporary file."""
    visible = [path for path in folder.iterdir() if path.name != REPORT and not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in visible}


def test_videos_are_written_as_shards_of_small_clips(videos: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    report = prepare(
        DataConfig(train=str(videos)), str(tmp_path), short_side=32, gop=8, progress=lambda *counts: done.append(counts)
    )
    assert (report.samples, report.frames, done[-1]) == (6, 180, (8, 8))
    assert {bad["reason"] for bad in report.bad} == {"is empty (zero bytes)", "has no video stream"}
    assert read_json(f"{tmp_path}/{REPORT}") == report.model_dump()
    assert "skipped" in str(report)
    manifest = open_manifest(DataConfig(train=str(tmp_path)))
    assert manifest.labels.tolist() == [0, 0, 0, 1, 1, 1]
    reader = SampleReader(DataConfig(train="x"))
    clip = reader.read_clip(manifest[4], np.arange)
    reader.close()
    assert clip.shape == (30, 32, 48, 3)
    whole = exact_frames(videos / "walk" / "1.mp4")
    small = np.stack([np.asarray(Image.fromarray(f).resize((48, 32), Image.Resampling.LANCZOS)) for f in whole])
    brightness = clip.mean(-1) - small.mean(-1)  # 4:2:0 halves the colour resolution
    assert np.abs(brightness).mean() < 5


def test_every_gop_of_a_prepared_video_is_closed_and_starts_with_a_key_frame(videos: Path, tmp_path: Path) -> None:
    import av

    prepare(DataConfig(train=str(videos)), str(tmp_path), short_side=32, gop=8, limit=1)
    record = open_manifest(DataConfig(train=str(tmp_path)))[0]
    content = Fetcher().fetch(record.location, record.offset, record.size)
    (tmp_path / "one.mp4").write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    with av.open(str(tmp_path / "one.mp4")) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        found = map_packets(packets, "h264", container.format.name, stream.codec_context.extradata)
    assert [n for n, packet in enumerate(packets) if packet.is_keyframe] == [0, 8, 16, 24]
    assert found is not None
    assert found.closed


def test_a_lower_frame_rate_keeps_every_nth_frame(videos: Path, tmp_path: Path) -> None:
    report = prepare(DataConfig(train=str(videos)), str(tmp_path), frame_rate=7.5, limit=1)
    assert report.frames == 8


def test_images_become_upright_jpegs_with_the_configured_short_side(tmp_path: Path) -> None:
    (tmp_path / "raw" / "a").mkdir(parents=True)
    Image.fromarray(pictures(1, 120, 60)[0]).save(tmp_path / "raw" / "a" / "big.png")
    Image.fromarray(pictures(1, 20, 10)[0]).save(tmp_path / "raw" / "a" / "small.png")
    prepare(DataConfig(train=str(tmp_path / "raw")), str(tmp_path / "out"), short_side=30)
    reader, manifest = SampleReader(DataConfig(train="x")), open_manifest(DataConfig(train=str(tmp_path / "out")))
    assert [reader.read_clip(record, np.arange).shape for record in manifest] == [(1, 30, 60, 3), (1, 10, 20, 3)]
    reader.close()


def test_a_second_run_does_not_rewrite_complete_shards(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amd.data.prepare._samples_per_shard", lambda mib, mean: 3)
    data = DataConfig(train=str(videos))
    first = prepare(data, str(tmp_path), short_side=32)
    before = _digests(tmp_path)
    assert first.shards == 3
    (tmp_path / f"000001.tar{INDEX_SUFFIX}").unlink()  # as if the run had stopped before this shard was committed
    (tmp_path / "000001.tar").write_bytes(b"half")
    (tmp_path / ".000001.tar.0123abcd").write_bytes(b"half")
    os.utime(tmp_path / ".000001.tar.0123abcd", (0, 0))
    second = prepare(data, str(tmp_path), short_side=32)
    assert (second.shards_kept, second.samples, len(second.bad)) == (2, 6, 2)
    assert not list(tmp_path.glob(".*"))
    assert _digests(tmp_path) == before


def test_parts_prepared_separately_produce_the_same_shards_as_a_single_run(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amd.data.prepare._samples_per_shard", lambda mib, mean: 3)
    data, whole, shared = DataConfig(train=str(videos)), tmp_path / "whole", tmp_path / "shared"
    expected = prepare(data, str(whole), short_side=32)
    second = prepare(data, str(shared), short_side=32, part="2/2")
    assert (second.shards, second.shards_missing, second.samples) == (1, 2, 2)
    assert not (shared / REPORT).exists()
    first = prepare(data, str(shared), short_side=32, part="1/2")
    differing = {"url", "seconds", "shards_kept"}
    assert first.model_dump(exclude=differing) == expected.model_dump(exclude=differing)
    assert _digests(shared) == _digests(whole)


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "-1/2", ""])
def test_an_invalid_part_is_rejected(videos: Path, tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigError, match="K/N with 1 <= K <= N"):
        prepare(DataConfig(train=str(videos)), str(tmp_path), part=part)


def test_long_videos_are_cut_into_segments_without_losing_or_repeating_frames(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", str(tmp_path / "out")
    raw.mkdir()
    write_video(raw / "long.mp4", pictures(65, seed=1), gop=250)  # 65 frames at 30 per second
    write_video(raw / "short.mp4", pictures(10, seed=2), gop=250)
    report = prepare(DataConfig(train=str(raw)), out, segment_s=0.8)  # segments of 24 frames; the last has 17
    assert (report.samples, report.frames) == (4, 75)
    reader, manifest = SampleReader(DataConfig(train="x")), open_manifest(DataConfig(train=out))
    clips = [reader.read_clip(record, np.arange) for record in manifest]
    reader.close()
    assert [len(clip) for clip in clips] == [24, 24, 17, 10]
    error = np.abs(np.concatenate(clips[:3]).astype(int) - exact_frames(raw / "long.mp4"))
    assert error.mean() < 12


JOB = """
import sys
import amd.data.prepare as p
from amd.config import DataConfig
p._samples_per_shard = lambda mib, mean: 2
p.prepare(DataConfig(train=sys.argv[1]), sys.argv[2], short_side=32, workers=2)
"""


@pytest.mark.slow
def test_a_run_restarted_after_sigkill_writes_identical_bytes(videos: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-c", JOB, str(videos)]
    root = Path(__file__).parents[3]
    subprocess.run([*command, str(whole)], cwd=root, check=True)
    job = subprocess.Popen([*command, str(broken)], cwd=root)
    while job.poll() is None and not list(broken.glob(f"*{INDEX_SUFFIX}")):
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    subprocess.run([*command, str(broken)], cwd=root, check=True)
    assert _digests(whole) == _digests(broken)


def test_output_written_with_different_settings_is_rejected(videos: Path, tmp_path: Path) -> None:
    prepare(DataConfig(train=str(videos)), str(tmp_path), short_side=32, limit=1)
    with pytest.raises(ManifestError, match="short_side was 32, is now 48"):
        prepare(DataConfig(train=str(videos)), str(tmp_path), short_side=48, limit=1)


def test_frame_folders_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("clip 12 0\n")
    with pytest.raises(ManifestError, match="frame folders cannot be prepared"):
        prepare(DataConfig(train=str(tmp_path / "l.txt")), str(tmp_path / "out"))


def test_preparation_reads_from_and_writes_to_s3(s3_root: str, videos: Path) -> None:
    for file in (videos / "run").iterdir():
        write_bytes(f"{s3_root}/raw/run/{file.name}", file.read_bytes())
    report = prepare(DataConfig(train=f"{s3_root}/raw"), f"{s3_root}/out", short_side=32, workers=1)
    assert (report.samples, len(report.bad)) == (3, 1)
    assert listdir(f"{s3_root}/out") == ["000000.tar", f"000000.tar{INDEX_SUFFIX}", "prepare.json", REPORT]
    manifest, reader = open_manifest(DataConfig(train=f"{s3_root}/out")), SampleReader(DataConfig(train="x"))
    assert reader.read_clip(manifest[2], np.arange).shape == (30, 32, 48, 3)
    reader.close()


def test_an_error_in_one_worker_stops_the_other_workers_and_is_raised(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amd.data.prepare._samples_per_shard", lambda mib, mean: 1)

    def fail_on_second_shard(url: str, content: bytes) -> None:
        if url.endswith("000001.tar"):
            raise OSError("No space left on device")
        write_bytes(url, content)

    monkeypatch.setattr("amd.data.prepare.write_bytes", fail_on_second_shard)
    with pytest.raises(OSError, match="No space left"):
        prepare(DataConfig(train=str(videos)), str(tmp_path), short_side=32, workers=2)
    assert not (tmp_path / f"000001.tar{INDEX_SUFFIX}").exists()
    assert not (tmp_path / REPORT).exists()
