"""A file with a cached packet map is read without scanning its packets, and yields the same frames."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amd.data.decoding import map_cache, video
from amd.data.decoding.frames import VideoError
from amd.data.decoding.sequential import SequentialVideo
from amd.data.decoding.video import open_video
from tests.amd.data.decoding.test_video import DECODERS, FRAMES, ORDINARY
from tests.support.data.videos import exact_frames, write_video


@pytest.fixture(autouse=True)
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache packet maps in a temporary folder, including maps of short videos."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(map_cache, "MIN_PACKETS", 1)
    return tmp_path / "tmp" / f"amd-packet-maps-{os.getuid()}"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that records each pass over all packets of a file."""
    found: list[Any] = []
    read = video.read_packets
    monkeypatch.setattr(video, "read_packets", lambda *args: found.append(args) or read(*args))
    return found


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_match_sequential_decoding(kind: str, decoder: str, tmp_path: Path, passes: list[Any]) -> None:
    path = ORDINARY[kind][1](tmp_path)
    exact, draws = exact_frames(path), random.Random(kind)
    first = open_video(path, decoder)
    first.close()
    if isinstance(first, SequentialVideo):
        return
    for _ in range(12):
        again = open_video(path, decoder)
        assert again.frames == len(exact)
        chosen = [draws.randrange(len(exact)) for _ in range(draws.choice([1, 2, 5]))]
        np.testing.assert_array_equal(again.read(chosen), exact[chosen])
        again.close()
    assert len(passes) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_a_clip_is_read_by_seeking(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / name, FRAMES, gop=10)
    open_video(path).close()
    sought: list[Any] = []
    seek = video.seek_packets
    monkeypatch.setattr(video, "seek_packets", lambda *args: sought.append(seek(*args)) or sought[-1])
    open_video(path).read([33, 35])
    (packets,) = sought
    assert packets is not None
    assert len(packets) <= 10


def test_the_map_of_a_changed_file_is_rebuilt(tmp_path: Path, passes: list[Any]) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES)
    open_video(path).close()
    write_video(path, FRAMES[:20])
    assert open_video(path).frames == 20
    assert len(passes) == 2


def test_an_unreadable_map_is_rewritten(tmp_path: Path, maps: Path, passes: list[Any]) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES)
    open_video(path).close()
    (saved,) = maps.iterdir()
    saved.write_bytes(saved.read_bytes()[:100])
    assert open_video(path).frames == len(FRAMES)
    assert open_video(path).frames == len(FRAMES)
    assert len(passes) == 2


def test_no_map_is_stored_for_damaged_or_short_files(
    tmp_path: Path, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_video(tmp_path / "a.mkv", FRAMES)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(VideoError):
        open_video(cut)
    open_video(cut, min_decoded_share=0.1).close()
    monkeypatch.setattr(map_cache, "MIN_PACKETS", len(FRAMES) + 1)
    open_video(whole).close()
    assert not maps.exists() or not list(maps.iterdir())


def test_the_number_of_cached_maps_is_bounded(tmp_path: Path, maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_cache, "MAX_MAPS", 4)
    for number in range(9):
        open_video(write_video(tmp_path / f"{number}.mp4", FRAMES[:5])).close()
    assert 2 <= len(list(maps.iterdir())) <= 4
