"""Tests for shortened IDs: a unique prefix is accepted, and an ambiguous one is rejected with its candidates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from amd.config import ConfigError
from service.cli.ids import matching_ids, stored_id, unique_id

IDS = ["train-20260101-1a2b", "train-20260102-3c4d", "wh_5e6f", "train-20260101-1a2b-2"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("train-20260102", ["train-20260102-3c4d"]),
        ("3c", ["train-20260102-3c4d"]),
        ("5e", ["wh_5e6f"]),
        ("train-20260101-1a2b", ["train-20260101-1a2b"]),
        ("train", ["train-20260101-1a2b", "train-20260102-3c4d", "train-20260101-1a2b-2"]),
        ("4d", []),
    ],
)
def test_an_id_is_found_by_a_prefix_of_the_id_or_of_its_last_part(text: str, found: list[str]) -> None:
    assert matching_ids(text, IDS) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train",
            "'train' matches 3 jobs: train-20260101-1a2b, train-20260102-3c4d, train-20260101-1a2b-2; use a longer",
        ),
        ("x", "no job 'x'; `amd jobs list` lists the existing jobs"),
        ("", "no job ''"),
    ],
)
def test_an_ambiguous_or_unknown_id_is_rejected_with_an_explanation(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        unique_id(text, IDS, "job", "amd jobs list")


def test_a_shortened_stored_id_is_expanded_and_an_unknown_id_is_returned_unchanged(tmp_path: Path) -> None:
    for name in ("first", "second-1"):
        (tmp_path / name).mkdir()
    assert stored_id("f", str(tmp_path), "run") == "first"
    assert stored_id("third", str(tmp_path), "run") == "third"
    (tmp_path / "second-2").mkdir()
    with pytest.raises(ConfigError, match="matches 2 runs"):
        stored_id("second", str(tmp_path), "run")
