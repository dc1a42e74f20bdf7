from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd.storage import join, write_bytes
from amd.training.reporting.media_files import (
    MAX_BYTES,
    MAX_STEPS,
    PICTURES,
    DamagedPicture,
    evenly_spaced,
    media_steps,
    read_picture,
    step_url,
)

WEBP = b"RIFF\x04\x00\x00\x00WEBPVP8 "


@given(st.sets(st.integers(1, 10_000)), st.integers(2, 30))
def test_evenly_spaced_steps_are_limited_and_include_the_first_and_the_last(steps: set[int], limit: int) -> None:
    ordered = sorted(steps)
    kept = evenly_spaced(ordered, limit)
    assert len(kept) == min(limit, len(ordered))
    assert kept == sorted(set(kept) & steps)
    assert kept[:1] == ordered[:1]
    assert kept[-1:] == ordered[-1:]


def test_the_gaps_between_evenly_spaced_steps_differ_by_at_most_one_step() -> None:
    kept = evenly_spaced(range(1, 1001))
    gaps = {later - earlier for earlier, later in itertools.pairwise(kept)}
    assert len(kept) == MAX_STEPS
    assert max(gaps) - min(gaps) <= 1


def test_a_step_is_listed_once_all_its_pictures_are_stored(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step, names in {20: PICTURES, 3: PICTURES, 5: PICTURES[:2]}.items():
        for name in names:
            write_bytes(join(step_url(run, step), name), WEBP)
    write_bytes(join(step_url(run, 3), "notes.txt"), b"not a picture")
    assert [(found.step, found.sizes) for found in media_steps(run)] == [
        (step, dict.fromkeys(sorted(PICTURES), len(WEBP))) for step in (3, 20)
    ]


@pytest.mark.parametrize(
    "content",
    [b"<svg onload=alert(1)>", b"RIFF\x04\x00\x00\x00WAVEfmt ", b"", WEBP.ljust(MAX_BYTES + 1)],
    ids=["svg", "audio", "empty", "large"],
)
def test_a_file_that_is_not_a_picture_or_is_too_large_is_rejected(tmp_path: Path, content: bytes) -> None:
    run = str(tmp_path)
    write_bytes(join(step_url(run, 1), "input.webp"), content)
    with pytest.raises(DamagedPicture):
        read_picture(run, 1, "input.webp")
    with pytest.raises(FileNotFoundError):
        read_picture(run, 2, "input.webp")
