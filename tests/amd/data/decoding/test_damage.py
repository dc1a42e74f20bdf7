"""Tests for damaged videos: `damage=tolerant` uses only frames that decode exactly; `strict` rejects the video."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from amd.config import DataConfig
from amd.data.dataset.record import BadSample, Record
from amd.data.decoding.frames import DamagedFrames, VideoError
from amd.data.decoding.packets import PacketMap
from amd.data.decoding.reader import SampleReader
from amd.data.decoding.transcode import transcode
from amd.data.decoding.video import MappedVideo, Video, open_video
from tests.support.data.damage import cut, declare_frames, overwrite_packets
from tests.support.data.videos import exact_frames, pictures, write_video

FRAMES = pictures(48)
FINE = {"qmin": "2", "qmax": "3"}  # so that packets are large relative to headers
SHARE = 0.5
MUXERS: dict[str, dict[str, object]] = {
    "a.mp4": {"container": {"movflags": "faststart"}},
    "a.mov": {"container": {"movflags": "faststart"}},
    "a.mkv": {},
    "a.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "a.avi": {"codec": "mpeg4", "options": FINE},
    "a.ts": {},
    "a.mpg": {"codec": "mpeg2video", "options": FINE},
    "a.flv": {"codec": "flv", "options": FINE},
    "a.wmv": {"codec": "wmv2", "options": FINE},
}
INDEXED = ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.avi"]  # containers that declare their length


@pytest.fixture(scope="module")
def tolerant() -> Iterator[SampleReader]:
    reader = SampleReader(DataConfig(train="x"))
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def strict() -> Iterator[SampleReader]:
    reader = SampleReader(DataConfig(train="x", damage="strict"))
    yield reader
    reader.close()


def _write(folder: Path, name: str) -> Path:
    return write_video(folder / name, FRAMES, **MUXERS[name])  # type: ignore[arg-type]


def _video(path: Path) -> Record:
    return Record(str(path), None, "video")


def _all_usable(path: Path, decoder: str = "pyav") -> tuple[Video, np.ndarray]:
    video = open_video(path, decoder, min_decoded_share=SHARE)
    try:
        return video, video.read(range(video.frames))
    except DamagedFrames:
        video.exclude_damaged()
        return video, video.read(range(video.frames))


@pytest.mark.parametrize("name", MUXERS)
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_all_frames_before_the_truncation_are_used(name: str, part: float, tmp_path: Path) -> None:
    path = _write(tmp_path, name)
    exact = exact_frames(path)
    video, frames = _all_usable(cut(path, part))
    assert part - 0.35 < video.frames / len(exact) <= part + 0.1
    shown = len(frames) - 2  # the last frame numbers may differ, because packets between those frames are missing
    np.testing.assert_array_equal(frames[:shown], exact[video.numbers[:shown]])
    if name in INDEXED:
        assert video.damage is not None
        assert video.damage.reason.startswith("is truncated")


@pytest.mark.parametrize("name", INDEXED)
def test_strict_rejects_truncated_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="is truncated"):
        open_video(cut(_write(tmp_path, name), 0.6))


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.avi"])
def test_no_frame_after_a_broken_packet_is_used_until_the_next_key_frame(name: str, tmp_path: Path) -> None:
    path = _write(tmp_path, name)
    exact = exact_frames(path)
    video, frames = _all_usable(overwrite_packets(path, [20]))
    assert video.damage is not None
    assert 0.7 * len(exact) <= video.frames == video.damage.usable < len(exact)
    np.testing.assert_array_equal(frames, exact[video.numbers])


def test_any_selection_of_frames_from_a_noisy_file_decodes_to_the_same_pixels(tmp_path: Path) -> None:
    """A subset of the usable frames has the same pixels as when all usable frames are read at once."""
    content, draws = _write(tmp_path, "a.mp4").read_bytes(), random.Random(0)
    start = content.find(b"mdat") + 4
    outcomes = {"used": 0, "rejected": 0}
    for case in range(8):
        noisy = bytearray(content)
        for _ in range(1 + case % 4):
            at = draws.randrange(start, len(noisy) - 40)
            noisy[at : at + 40] = draws.randbytes(40)
        path = tmp_path / "noisy.mp4"
        path.write_bytes(noisy)
        try:
            video, frames = _all_usable(path)
        except VideoError:
            outcomes["rejected"] += 1
            continue
        outcomes["used"] += 1
        chosen = sorted(draws.sample(range(video.frames), 5))
        np.testing.assert_array_equal(video.read(chosen), frames[chosen])  # any subset decodes to the same frames
    assert outcomes["used"] > 3


@pytest.mark.parametrize("damage", ["tolerant", "strict"])
def test_a_wrong_frame_count_in_the_header_is_not_treated_as_damage(damage: str, tmp_path: Path) -> None:
    path = declare_frames(_write(tmp_path, "a.avi"), 300)
    reader = SampleReader(DataConfig(train="x", damage=damage))  # type: ignore[arg-type]
    assert len(reader.read_clip(_video(path), np.arange)) == len(FRAMES)
    assert reader.last_read is not None
    assert reader.last_read.damage is None
    reader.close()


def test_a_sample_with_too_few_decodable_frames_is_bad(tmp_path: Path, tolerant: SampleReader) -> None:
    path = overwrite_packets(_write(tmp_path, "a.mp4"), range(12, 48))
    with pytest.raises(BadSample, match=r"of 48 frames decode.*below data\.min_decoded_share=0\.5"):
        tolerant.read_clip(_video(path), np.arange)
    lenient = SampleReader(DataConfig(train="x", min_decoded_share=0.05))
    assert len(lenient.read_clip(_video(path), np.arange)) == 12
    lenient.close()


def test_the_reader_chooses_again_from_the_decodable_frames(
    tmp_path: Path, tolerant: SampleReader, strict: SampleReader
) -> None:
    path = overwrite_packets(_write(tmp_path, "a.mp4"), [30])
    totals: list[int] = []

    def choose(total: int) -> np.ndarray:
        totals.append(total)
        return np.arange(total)

    clip = tolerant.read_clip(_video(path), choose)
    assert totals[0] == 48 > totals[1] == len(clip)
    assert tolerant.last_read is not None
    assert tolerant.last_read.damage is not None
    assert tolerant.last_read.damage.usable == len(clip)
    np.testing.assert_array_equal(tolerant.read_file(str(path), np.arange).pixels, clip)
    np.testing.assert_array_equal(tolerant.read_clip(_video(path), np.arange), clip)
    with pytest.raises(BadSample, match="damaged"):
        strict.read_clip(_video(path), np.arange)


def test_frame_numbers_on_the_timeline_include_undecodable_frames(tmp_path: Path, tolerant: SampleReader) -> None:
    path = _write(tmp_path, "a.mp4")
    exact = exact_frames(path)
    overwrite_packets(path, [30])
    totals: list[int] = []

    def around(frame: int, step: int) -> Callable[[int], np.ndarray]:
        return lambda total: totals.append(total) or (frame + step * np.arange(-2, 3)).clip(0, total - 1)  # type: ignore[func-returns-value]

    late = tolerant.read_clip(_video(path), around(44, 1), timeline=True)
    np.testing.assert_array_equal(late, exact[42:47])
    across = tolerant.read_clip(_video(path), around(32, 8), timeline=True)
    np.testing.assert_array_equal(across[[0, 4]], exact[[16, 47]])
    assert set(totals) == {48}
    with pytest.raises(BadSample, match="of 5 frames decode"):
        tolerant.read_clip(_video(path), around(33, 1), timeline=True)


def test_transcoding_writes_only_decodable_frames(tmp_path: Path) -> None:
    path = overwrite_packets(_write(tmp_path, "a.mp4"), [30])
    sizes = {"short_side": 32, "gop": 8, "crf": 23, "frame_rate": None, "quality": 90}
    with pytest.raises(VideoError):
        transcode(path, "video", **sizes)  # type: ignore[arg-type]
    done = transcode(path, "video", **sizes, min_decoded_share=SHARE)  # type: ignore[arg-type]
    assert done.damage is not None
    assert done.facts["frames"] == done.damage.usable


def test_a_large_damaged_file_is_reread_correctly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "a.avi"):
        path = overwrite_packets(_write(tmp_path, name), [30])
        _, expected = _all_usable(path)
        monkeypatch.setattr("amd.data.decoding.video.MAX_KEPT_PACKET_BYTES", 1000)
        monkeypatch.setattr("amd.data.decoding.sequential.MAX_KEPT_FRAME_BYTES", 1000)
        _, frames = _all_usable(path)
        np.testing.assert_array_equal(frames, expected)
        monkeypatch.undo()


@pytest.mark.skipif(find_spec("decord") is None, reason="decord has no wheel for this platform")
class TestDecord:
    def test_pyav_reads_videos_that_decord_cannot_decode(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import decord

        path = _write(tmp_path, "a.mp4")
        exact = exact_frames(path)

        class Broken(decord.VideoReader):  # type: ignore[misc]
            fault = ""

            def __len__(self) -> int:
                return super().__len__() + (self.fault == "count")

            def get_batch(self, indices: list[int]) -> object:
                if self.fault == "error":
                    raise decord.DECORDError("broken")
                return super().get_batch([min(indices)] * len(indices) if self.fault == "repeats" else indices)

        monkeypatch.setattr(decord, "VideoReader", Broken)
        for fault, decoder in {"": "decord", "count": "pyav", "error": "pyav", "repeats": "pyav"}.items():
            Broken.fault = fault
            video = open_video(path, "decord")
            np.testing.assert_array_equal(video.read([3, 30, 7]), exact[[3, 30, 7]])
            assert video.decoder == decoder, fault
            video.close()

    def test_truncated_files_are_read_by_pyav(self, tmp_path: Path) -> None:
        video, _ = _all_usable(cut(_write(tmp_path, "a.mp4"), 0.6), "decord")
        assert video.decoder == "pyav"
        assert video.damage is not None

    def test_the_frame_limit_applies_to_decord(self, tmp_path: Path) -> None:
        from amd.data.decoding.limits import VideoLimits

        with pytest.raises(VideoError, match="has 48 frames, more than the limit of 20"):
            open_video(_write(tmp_path, "a.mp4"), "decord", VideoLimits(10**6, 20, 100.0))


def test_removing_broken_packets_omits_every_frame_that_needs_them(tmp_path: Path) -> None:
    video = open_video(_write(tmp_path, "a.mp4"))
    assert isinstance(video, MappedVideo)
    whole: PacketMap = video.packet_map
    for broken in ([0], [5, 40], [47], []):
        reduced = whole.without(broken)
        needed = {n: range(r.start, r.stop) for n in range(whole.frames) for r in whole.ranges([n])}
        expected = [n for n, packets in needed.items() if not set(broken) & set(packets)]
        assert list(reduced.numbers) == expected
        assert reduced.pts == [whole.pts[n] for n in expected]
