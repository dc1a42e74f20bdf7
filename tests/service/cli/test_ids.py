"""Shortened ids: unique beginnings are accepted, others list the candidates."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

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
def test_an_id_is_found_by_its_beginning_or_that_of_its_last_part(text: str, found: list[str]) -> None:
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
def test_other_text_exits_with_code_2_and_lists_the_candidates(
    text: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped:
        unique_id(text, IDS, "job", "amd jobs list")
    assert stopped.value.exit_code == 2
    assert message in capfd.readouterr().err


def test_a_stored_id_may_be_shortened_or_unknown(tmp_path: Path) -> None:
    for name in ("first", "second-1"):
        (tmp_path / name).mkdir()
    assert stored_id("f", str(tmp_path), "run") == "first"
    assert stored_id("third", str(tmp_path), "run") == "third"
    (tmp_path / "second-2").mkdir()
    with pytest.raises(typer.Exit):
        stored_id("second", str(tmp_path), "run")
