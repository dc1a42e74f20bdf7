"""Tests for decoding/reader.py, images.py and fetch.py: every kind of record, and the reason for every error."""

from __future__ import annotations

import errno
import io
import random
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amd.config import ConfigError, DataConfig
from amd.data.dataset.open import open_manifest
from amd.data.dataset.record import Record, kind_of
from amd.data.decoding.reader import BadSample, SampleReader, check_decoder
from amd.data.fetching.fetch import Fetcher, FetchError
from amd.storage import StorageUnreachable, write_bytes
from tests.support.data.videos import exact_frames, pictures, write_audio_only, write_video

FRAMES = pictures(12)


@pytest.fixture(scope="module")
def reader() -> Iterator[SampleReader]:
    reader = SampleReader(DataConfig(train="x", damage="strict"))  # test_damage.py uses damaged files
    yield reader
    reader.close()


def _all(total: int) -> np.ndarray:
    return np.arange(total)


def _record(path: Path | str) -> Record:
    return Record(str(path), None, kind_of(str(path)))


def _reason(reader: SampleReader, record: Record, choose: Callable[[int], np.ndarray] = _all) -> str:
    with pytest.raises(BadSample) as error:
        reader.read_clip(record, choose)
    assert error.value.record == record
    assert "\n" not in error.value.reason
    return error.value.reason


def test_decord_is_rejected_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    check_decoder(DataConfig(train="x"))
    with pytest.raises(ConfigError, match=r"data\.decoder=decord: decord is not installed.*use data\.decoder=pyav"):
        SampleReader(DataConfig(train="x", decoder="decord"))


def test_video_frames_are_returned_in_the_requested_order(reader: SampleReader, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a b.mp4", FRAMES)
    clip = reader.read_clip(_record(path), lambda total: np.array([total - 1, 0, 5, 5]))
    assert clip.dtype == np.uint8
    assert clip.flags.writeable
    np.testing.assert_array_equal(clip, exact_frames(path)[[11, 0, 5, 5]])


def test_a_clip_does_not_change_on_the_next_read(reader: SampleReader, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES)
    first = reader.read_clip(_record(path), lambda _: np.array([0]))
    copy = first.copy()
    reader.read_clip(_record(path), _all)
    np.testing.assert_array_equal(first, copy)


def test_an_image_is_a_clip_of_one_frame(reader: SampleReader, tmp_path: Path) -> None:
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(reader.read_clip(_record(tmp_path / "a.png"), _all), FRAMES[:1])


def test_files_in_frame_folders_are_numbered_from_one(tmp_path: Path) -> None:
    folder = tmp_path / "clip 1"
    folder.mkdir()
    for n in (2, 5):
        Image.fromarray(FRAMES[n]).save(folder / f"f{n + 1}.png")
    reader = SampleReader(DataConfig(train="x", frame_name="f{}.png"))
    record = Record(str(folder), 3, "frames", frames=12)
    np.testing.assert_array_equal(
        reader.read_clip(record, lambda _: np.array([5, 2, 5])), [FRAMES[n] for n in (5, 2, 5)]
    )
    assert _reason(reader, record, lambda _: np.array([0])) == "frame f1.png does not exist"
    Image.new("RGB", (9, 9)).save(folder / "f1.png")
    reason = _reason(reader, record, lambda _: np.array([0, 2]))
    assert "frame f3.png is (64, 96), but other frames are (9, 9)" in reason
    reader.close()


def _write(path: Path, kind: str) -> Path:
    good_video, good_image = path.parent / "good.mp4", path.parent / "good.jpg"
    write_video(good_video, FRAMES, container={"movflags": "faststart"})
    Image.fromarray(FRAMES[0]).save(good_image)
    whole = {"mp4": good_video, "jpg": good_image}[path.suffix[1:]].read_bytes()
    other = good_image if path.suffix == ".mp4" else good_video
    contents: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: whole[: len(whole) * 2 // 3],
        "zero bytes": lambda: b"",
        "random": lambda: random.Random(0).randbytes(3000),
        "text": lambda: b"no media here\n" * 50,
        "wrong extension": other.read_bytes,
    }
    path.write_bytes(contents[kind]())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "jpg"])
@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "random", "text", "wrong extension"])
def test_every_kind_of_broken_file_is_reported(kind: str, suffix: str, reader: SampleReader, tmp_path: Path) -> None:
    expected = {"truncated": "truncated", "zero bytes": "is empty"}.get(kind, "is not an? (video|image)")
    reason = _reason(reader, _record(_write(tmp_path / f"bad.{suffix}", kind)))
    assert re.search(expected, reason), reason


def test_missing_files_audio_files_and_folders_are_reported(reader: SampleReader, tmp_path: Path) -> None:
    assert _reason(reader, _record(tmp_path / "missing.mp4")) == "does not exist"
    assert _reason(reader, _record(tmp_path / "missing.jpg")) == "does not exist"
    assert _reason(reader, _record(write_audio_only(tmp_path / "sound.mp4"))) == "has no video stream"
    (tmp_path / "folder.mp4").mkdir()
    assert _reason(reader, _record(tmp_path / "folder.mp4")) == "is a folder, not a file"


def test_choosing_an_out_of_range_frame_raises_index_error(reader: SampleReader, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES)
    with pytest.raises(IndexError, match="for a sample of 12"):
        reader.read_clip(_record(path), lambda total: np.array([total]))


def test_bad_sample_can_be_pickled() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadSample(Record("a.mp4", 1, "video"), "is empty")))
    assert str(error) == "a.mp4 is empty"


# Images


def _round_trip(reader: SampleReader, image: Image.Image, path: Path, **options: object) -> np.ndarray:
    image.save(path, **options)  # type: ignore[arg-type]
    return reader.read_clip(_record(path), _all)[0]


def test_images_are_rotated_by_their_exif_orientation(reader: SampleReader, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(FRAMES[0])
    turned = _round_trip(reader, picture, tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(turned, np.rot90(FRAMES[0], -1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA", "I;16"])
def test_images_of_every_mode_are_converted_to_rgb(mode: str, reader: SampleReader, tmp_path: Path) -> None:
    grey = Image.fromarray(FRAMES[0]).convert("L")
    if mode == "I;16":
        image = Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 255)
    else:
        colored = grey.convert("RGB")
        image = colored.quantize(256) if mode == "P" else colored.convert(mode)
    read = _round_trip(reader, image, tmp_path / "a.tif")
    expected = np.asarray(grey.convert("1").convert("RGB") if mode == "1" else grey.convert("RGB"))
    assert np.abs(read.astype(int) - expected).max() <= (12 if mode == "CMYK" else 2)


def test_transparent_pixels_become_white(reader: SampleReader, tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (_round_trip(reader, image, tmp_path / "a.png") == 255).all()


def test_only_the_first_frame_of_an_animation_is_read(reader: SampleReader, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    read = _round_trip(reader, frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read[0, 0].tolist() == [255, 0, 0]


def test_an_image_with_too_many_pixels_is_rejected_before_decoding(reader: SampleReader, tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert "pixels" in _reason(reader, _record(tmp_path / "bomb.png"))


# Remote files


def _s3(reader: SampleReader, url: str) -> np.ndarray:
    return reader.read_clip(_record(url), _all)


def test_remote_files_are_read_and_cached(s3_root: str, tmp_path: Path) -> None:
    import boto3

    path = write_video(tmp_path / "a.mp4", FRAMES)
    url = f"{s3_root}/set/a b.mp4"
    write_bytes(url, path.read_bytes())
    reader = SampleReader(DataConfig(train="x", cache_dir=str(tmp_path / "cache")))
    assert _reason(reader, _record(f"{s3_root}/set/missing.mp4")) == "does not exist"
    np.testing.assert_array_equal(_s3(reader, url), exact_frames(path))
    boto3.client("s3").delete_object(Bucket=s3_root[5:], Key="set/a b.mp4")
    np.testing.assert_array_equal(_s3(reader, url), exact_frames(path))
    reader.close()


def test_frame_folders_on_s3_are_read(s3_root: str) -> None:
    for n in range(3):
        out = io.BytesIO()
        Image.fromarray(FRAMES[n]).save(out, "PNG")
        write_bytes(f"{s3_root}/clip/img_{n + 1:05}.jpg", out.getvalue())
    reader = SampleReader(DataConfig(train="x"))
    clip = reader.read_clip(Record(f"{s3_root}/clip", None, "frames", frames=3), _all)
    np.testing.assert_array_equal(clip, FRAMES[:3])
    assert "does not exist" in _reason(reader, Record(f"{s3_root}/clip", None, "frames", frames=4))
    reader.close()


@pytest.mark.slow
def test_a_read_from_a_store_that_never_responds_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The server accepts the connection and never responds."""
    monkeypatch.setattr("amd.storage.file_operations.OUTAGE_LIMIT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for key, value in {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(key, value)
        accepted: list[socket.socket] = []
        threading.Thread(target=lambda: accepted.append(server.accept()[0]), daemon=True).start()
        reader = SampleReader(DataConfig(train="x", read_timeout_s=2))
        with pytest.raises(StorageUnreachable, match=r"s3://bucket/a\.mp4.*could not be fetched within 2 s"):
            reader.read_clip(_record("s3://bucket/a.mp4"), _all)
        assert accepted, "no read reached the server"
        good = write_video(tmp_path / "a.mp4", FRAMES)
        assert reader.read_clip(_record(good), _all).shape == (12, 64, 96, 3)
        reader.close()


class _Flaky:
    """A remote filesystem that raises the given errors before it succeeds."""

    protocol = "flaky"

    def __init__(self, failures: list[Exception]) -> None:
        self.failures, self.requests = failures, 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        self.requests += 1
        if self.failures:
            raise self.failures.pop(0)
        return b"0123456789"[start:end]


@pytest.mark.parametrize(
    ("failures", "retries", "requests", "reason"),
    [
        ([TimeoutError("slow"), OSError("reset")], 3, 3, None),
        ([OSError("reset")] * 3, 2, 3, r"could not be read after 3 attempts \(OSError: reset\)"),
        ([FileNotFoundError("x")], 3, 1, "does not exist"),
        ([OSError(errno.EINVAL, "the range is not satisfiable")] * 3, 2, 3, "is not satisfiable"),
        ([PermissionError("x")], 3, 1, "cannot be read"),
    ],
)
def test_transient_errors_are_retried_but_permanent_errors_are_not(
    failures: list[Exception], retries: int, requests: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = _Flaky(failures)
    monkeypatch.setattr("amd.data.fetching.fetch.filesystem", lambda url: (flaky, url))
    fetcher = Fetcher(retries, pause_s=0)
    if reason is None:
        assert fetcher.fetch("s3://b/x", 2, 3) == b"234"
    else:
        with pytest.raises(FetchError, match=reason):
            fetcher.fetch("s3://b/x")
    assert flaky.requests == requests


def test_a_member_that_extends_past_the_end_of_its_shard_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(100))
    with pytest.raises(FetchError, match="is truncated: 40 of 50 bytes"):
        Fetcher().fetch(str(tmp_path / "x.tar"), 60, 50)
    monkeypatch.setattr("amd.data.fetching.fetch.filesystem", lambda url: (_Flaky([]), url))
    with pytest.raises(FetchError, match="is truncated: 4 of 9 bytes"):
        Fetcher().fetch("s3://b/x", 6, 9)


def test_a_member_past_the_end_of_a_shard_on_s3_is_bad(s3_root: str) -> None:
    write_bytes(f"{s3_root}/x.tar", bytes(100))
    reader = SampleReader(DataConfig(train="x", retries=0))
    assert "could not be read" in _reason(reader, Record(f"{s3_root}/x.tar", None, "image", offset=200, size=50))
    reader.close()


def test_a_sample_is_read_even_if_the_cache_is_unusable(tmp_path: Path, s3_root: str) -> None:
    write_bytes(f"{s3_root}/a.mp4", write_video(tmp_path / "a.mp4", FRAMES).read_bytes())
    (tmp_path / "cache").write_text("a file where the folder should be")
    reader = SampleReader(DataConfig(train="x", cache_dir=str(tmp_path / "cache")))
    assert _s3(reader, f"{s3_root}/a.mp4").shape == (12, 64, 96, 3)
    reader.close()


def test_a_folder_with_unreadable_files_is_read_to_the_end(reader: SampleReader, tmp_path: Path) -> None:
    good = write_video(tmp_path / "a.mp4", FRAMES)
    shutil.copy(good, tmp_path / "c.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    read = []
    for record in open_manifest(DataConfig(train=str(tmp_path))):
        try:
            read.append(len(reader.read_clip(record, _all)))
        except BadSample as error:
            read.append(error.reason)
    assert read == [12, "is empty (zero bytes)", 12]
