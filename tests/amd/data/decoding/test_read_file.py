"""Tests for SampleReader.read_file, decoding/limits.py and decoding/images.py: any file type within limits."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amd.config import DataConfig
from amd.data.dataset.record import Record
from amd.data.decoding.images import FORMATS, is_image
from amd.data.decoding.isolation import KEEP_BYTES
from amd.data.decoding.limits import FileLimits
from amd.data.decoding.reader import BadSample, SampleReader
from amd.storage import join, write_bytes
from tests.support.data.videos import exact_frames, pictures, write_video

FRAMES = pictures(8, 32, 24)
LIMITS = FileLimits(bytes=1 << 20, pixels=10_000, frames=20, duration_s=5.0, decoded_bytes=100_000)


@pytest.fixture(scope="module")
def reader() -> Iterator[SampleReader]:
    reader = SampleReader(DataConfig(train="", retries=0), LIMITS)
    yield reader
    reader.close()


def all_of(total: int) -> np.ndarray:
    return np.arange(total)


def picture(size: tuple[int, int] = (20, 10), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def test_bytes_and_paths_yield_the_same_frames_for_any_file_name(reader: SampleReader, tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", FRAMES)
    for name in ("a.png", "a.mp4", "a"):
        (tmp_path / name).write_bytes(video.read_bytes())
        np.testing.assert_array_equal(reader.read_file(str(tmp_path / name), all_of).pixels, exact_frames(video))
        (tmp_path / name).write_bytes(picture())
        np.testing.assert_array_equal(
            reader.read_file(str(tmp_path / name), all_of).pixels[0], np.asarray(Image.open(io.BytesIO(picture())))
        )
    np.testing.assert_array_equal(reader.read_file("?", all_of, video.read_bytes()).pixels, exact_frames(video))


def test_fetching_a_remote_file_has_a_separate_time_limit(s3_root: str) -> None:
    reader = SampleReader(
        DataConfig(train="", retries=0), LIMITS
    )  # the decoding process inherits the store's environment variables
    write_bytes(join(s3_root, "a"), picture())
    write_bytes(join(s3_root, "large"), bytes(LIMITS.bytes + 1))
    assert reader.read_file(join(s3_root, "a"), all_of, fetch_limit_s=60).pixels.shape == (1, 20, 10, 3)
    with pytest.raises(BadSample, match=f"has {LIMITS.bytes + 1} bytes, more than the limit of {LIMITS.bytes}"):
        reader.read_file(join(s3_root, "large"), all_of, fetch_limit_s=60)
    reader.close()


def test_a_repeated_frame_is_decoded_once(reader: SampleReader, tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", FRAMES)
    frames = reader.read_file(str(video), lambda total: np.array([5, 2, 5, 5]))
    assert frames.pixels.shape[0] == 2
    np.testing.assert_array_equal(frames.pixels[frames.order], exact_frames(video)[[5, 2, 5, 5]])


def test_every_supported_format_is_detected_by_its_first_bytes() -> None:
    for format in FORMATS:
        try:
            content = picture(format=format)
        except KeyError:  # this build of Pillow cannot write the format
            continue
        assert is_image(content[:64]), format
    for other in (b"", b"P", b"\x00\x00\x00\x18ftypisom", b"RIFF\0\0\0\0AVI ", b"%!PS-Adobe", b"\x1a\x45\xdf\xa3"):
        assert not is_image(other)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"path,label\r\na.jpg,0\r\n", "it contains text"),
        (b"\xef\xbb\xbf<!DOCTYPE html>" + "ä".encode() * 5000, "it contains text"),
        (b"\x00\x00\x00\x18ftypisom", "it may be truncated"),
        (b"RIFF\xff\x00\x00\x00AVI ", "it may be truncated"),
    ],
)
def test_only_files_that_may_be_media_are_called_truncated(
    content: bytes, cause: str, reader: SampleReader, tmp_path: Path
) -> None:
    with pytest.raises(BadSample, match=f"is neither an image nor a video that can be opened; {cause}$"):
        reader.read_file("?", all_of, content)
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(BadSample, match=f"is not a video that can be opened .*; {cause}$"):
        reader.read_clip(Record(str(tmp_path / "a.mp4"), None, "video"), all_of)


def test_files_that_exceed_the_limits_are_rejected(reader: SampleReader, tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", FRAMES)
    slow = write_video(tmp_path / "slow.mp4", FRAMES, fps=1)
    long = write_video(tmp_path / "long.mp4", pictures(21, 32, 24))
    wide = write_video(tmp_path / "wide.mp4", pictures(2, 128, 96))
    (tmp_path / "bytes").write_bytes(bytes(LIMITS.bytes + 1))
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "bytes": "bytes, more than",
        "pipe": "is not a regular file",
        slow.name: "is 8 s long, more than the limit of 5 s",
        long.name: "has 21 frames, more than the limit of 20",
        wide.name: "has 128x96 pixels per frame, more than the limit of 10000",
    }.items():
        with pytest.raises(BadSample, match=reason):
            reader.read_file(str(tmp_path / name), all_of)
    with pytest.raises(BadSample, match="has 101x100 pixels, more than the limit of 10000"):
        reader.read_file("?", all_of, picture((100, 101)))
    tall = write_video(tmp_path / "tall.mp4", pictures(9, 96, 64))
    with pytest.raises(BadSample, match="needs 165888 bytes for 9 frames, more than the limit of 100000"):
        reader.read_file(str(tall), all_of)
    assert reader.read_file(str(video), all_of).pixels.shape == (8, 24, 32, 3)


def test_no_file_is_lost_if_the_decoding_process_is_killed_between_reads(reader: SampleReader) -> None:
    for _ in range(2):
        assert reader.read_file("?", all_of, picture()).pixels.shape == (1, 20, 10, 3)
        process = reader._child.start().process
        process.kill()
        process.wait()


def test_memory_used_by_a_large_response_is_released() -> None:
    reader = SampleReader(DataConfig(train=""))
    side = 4000
    assert reader.read_file("?", all_of, picture((side, side), "BMP")).pixels.nbytes == 3 * side**2 > KEEP_BYTES
    process = reader._child.start()
    assert os.fstat(process.memory).st_blocks * 512 < 1 << 20
    small = reader.read_file("?", all_of, picture())  # the next response is still intact
    np.testing.assert_array_equal(small.pixels[0], np.asarray(Image.open(io.BytesIO(picture()))))
    reader.close()
