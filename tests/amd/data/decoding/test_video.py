"""Tests for decoding/video.py, decoding/packets.py and decoding/decord_video.py: exact frames or a clear error.

The reference is sequential decoding by PyAV, from the first packet to the last.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amd.data.decoding.frames import VideoError
from amd.data.decoding.sequential import SequentialVideo
from amd.data.decoding.video import MappedVideo, open_video
from tests.support.data.videos import (
    copy_av1,
    cut_copy,
    exact_frames,
    pictures,
    set_edit,
    set_rotation,
    write_audio_only,
    write_video,
)

FRAMES = pictures(50)
X264_OPEN = {"x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=12:min-keyint=12"}
X265 = {"x265-params": "log-level=error:keyint=12"}
Writer = Callable[[Path], Path]
NO_DECORD = pytest.mark.skipif(find_spec("decord") is None, reason="decord has no wheel for this platform")
DECODERS = ["pyav", pytest.param("decord", marks=NO_DECORD)]


def _writer(name: str, **options: object) -> tuple[str, Writer]:
    return name, lambda folder: write_video(folder / name, FRAMES, **options)  # type: ignore[arg-type]


ORDINARY: dict[str, tuple[str, Writer]] = {
    "closed GOP 12, audio": _writer("a.mp4", audio=True),
    "one GOP": _writer("a.mp4", gop=250),
    "open GOP": _writer("a.mp4", options=X264_OPEN),
    "open GOP, mkv": _writer("a.mkv", options=X264_OPEN),
    "intra refresh": _writer("a.mp4", options={"x264-params": "intra-refresh=1:keyint=12"}),
    "many references": _writer("a.mp4", gop=20, options={"x264-params": "bframes=8:b-pyramid=normal:ref=8:weightp=2"}),
    "variable frame rate": _writer("a.mp4", times=np.cumsum([0, *[10 + 37 * n % 50 for n in range(49)]]).tolist()),
    "edit list, inside a GOP": (
        "a.mp4",
        lambda f: set_edit(write_video(f / "a.mp4", FRAMES), skip_frames=17, show_frames=20),
    ),
    "edit list, open GOP": (
        "a.mp4",
        lambda f: set_edit(write_video(f / "a.mp4", FRAMES, options=X264_OPEN), skip_frames=17, show_frames=20),
    ),
    "cut without re-encoding": (
        "b.mp4",
        lambda f: cut_copy(write_video(f / "a.mp4", FRAMES, options=X264_OPEN), f / "b.mp4"),
    ),
    "odd size": _writer("a.mp4", pix_fmt="yuv444p"),
    "interlaced": _writer("a.mp4", options={"x264-params": "interlaced=1"}),
    "10 bit H.264": _writer("a.mp4", pix_fmt="yuv420p10le"),
    "HEVC, open GOP": _writer("a.mp4", codec="libx265", options=X265),
    "10 bit HEVC": _writer("a.mkv", codec="libx265", pix_fmt="yuv420p10le", options=X265),
    "AV1": ("a.mp4", lambda f: copy_av1(f / "a.mp4")),
    "VP9": _writer("a.webm", codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "fragmented": _writer("a.mp4", container={"movflags": "frag_keyframe+empty_moov"}),
    "quicktime": _writer("a.mov"),
    "H.264 in avi": _writer("a.avi", options={"bf": "0"}),
    "MPEG-4 in avi": _writer("a.avi", codec="mpeg4"),
    "transport stream": _writer("a.ts", container_format="mpegts"),
    "program stream": _writer("a.mpg", codec="mpeg2video"),
}


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_match_sequential_decoding(kind: str, decoder: str, tmp_path: Path) -> None:
    path = ORDINARY[kind][1](tmp_path)
    exact, draws = exact_frames(path), random.Random(kind)
    for source in (path, path.read_bytes()):
        video = open_video(source, decoder)
        assert video.frames == len(exact)
        for _ in range(12):
            chosen = [draws.randrange(len(exact)) for _ in range(draws.choice([1, 2, 5]))]
            np.testing.assert_array_equal(video.read(chosen), exact[chosen])
        video.close()
    np.testing.assert_array_equal(np.stack([f.copy() for f in open_video(path).iter_frames(range(len(exact)))]), exact)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("decoder", DECODERS)
def test_rotated_video_is_decoded_upright(degrees: int, decoder: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES)
    plain = exact_frames(path)
    video = open_video(set_rotation(path, degrees), decoder)
    clockwise = np.rot90(plain, -degrees // 90, axes=(1, 2))
    np.testing.assert_array_equal(video.read([0, 31]), clockwise[[0, 31]])


def test_a_rotation_that_is_not_a_quarter_turn_is_rejected(tmp_path: Path) -> None:
    path = set_rotation(write_video(tmp_path / "a.mp4", FRAMES[:5]), 45)
    with pytest.raises(VideoError, match="not a multiple of 90 degrees"):
        open_video(path).read([0])


def test_mp4_is_decoded_by_packet_ranges_and_avi_sequentially(tmp_path: Path) -> None:
    assert isinstance(open_video(write_video(tmp_path / "a.mp4", FRAMES)), MappedVideo)
    assert isinstance(open_video(write_video(tmp_path / "a.avi", FRAMES, codec="mpeg4")), SequentialVideo)


def test_a_file_too_large_to_buffer_is_reread_correctly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amd.data.decoding.video.MAX_KEPT_PACKET_BYTES", 1000)
    monkeypatch.setattr("amd.data.decoding.sequential.MAX_KEPT_FRAME_BYTES", 1000)
    for path in (write_video(tmp_path / "a.mp4", FRAMES), write_video(tmp_path / "a.avi", FRAMES, codec="mpeg4")):
        exact = exact_frames(path)
        for chosen in ([40, 3, 17, 3], [49], [12, 13]):
            np.testing.assert_array_equal(open_video(path).read(chosen), exact[chosen])


@pytest.mark.parametrize("name", ["tail.mp4", "head.mp4", "a.mkv", "a.webm", "a.avi", "a.mov"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_rejected(name: str, part: float, tmp_path: Path) -> None:
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    container = {"movflags": "faststart"} if name == "head.mp4" else {}
    content = write_video(tmp_path / name, FRAMES, codec=codec, container=container).read_bytes()
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(VideoError):
        open_video(cut)


def _audio(path: Path) -> None:
    write_audio_only(path)


def _image(path: Path) -> None:
    Image.fromarray(FRAMES[0]).save(path, "JPEG")


NOT_VIDEOS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda p: p.write_bytes(b""), "zero bytes"),
    "random bytes": (lambda p: p.write_bytes(random.Random(0).randbytes(5000)), "not a video"),
    "text": (lambda p: p.write_text("this is not a video\n" * 40), "not a video"),
    "an image": (_image, "not a video"),
    "audio only": (_audio, "no video stream"),
    "a playlist of another file": (lambda p: p.write_text("#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n"), "not a video"),
    "a folder": (lambda p: p.mkdir(), "not a video"),
}


@pytest.mark.parametrize("kind", NOT_VIDEOS)
def test_files_that_are_not_videos_are_rejected_with_the_reason(kind: str, tmp_path: Path) -> None:
    write, reason = NOT_VIDEOS[kind]
    write(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=reason):
        open_video(tmp_path / "a.mp4")


def test_frames_that_the_decoder_reports_as_damaged_are_never_returned(tmp_path: Path) -> None:
    """Undetected damage (a valid slice with different pixels) yields the same frames as sequential decoding."""
    path = write_video(tmp_path / "a.mp4", FRAMES, options={"crf": "18"})
    content, exact, draws = path.read_bytes(), exact_frames(path), random.Random(0)
    start, stop = content.find(b"mdat") + 4, content.find(b"moov") - 60
    correct = rejected = undetected = 0
    for _ in range(40):
        damaged = bytearray(content)
        at = draws.randrange(start + (stop - start) // 8, stop)
        damaged[at : at + 30] = draws.randbytes(30)
        chosen = sorted(draws.sample(range(len(exact)), 4))
        try:
            frames = open_video(bytes(damaged)).read(chosen)
        except VideoError:
            rejected += 1
            continue
        if np.array_equal(frames, exact[chosen]):
            correct += 1
        else:
            undetected += 1
            (tmp_path / "b.mp4").write_bytes(damaged)
            np.testing.assert_array_equal(frames, exact_frames(tmp_path / "b.mp4")[chosen])
    assert rejected > undetected
    assert correct > 5
