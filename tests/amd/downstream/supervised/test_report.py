"""Tests for the result files and warnings shared by all supervised runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from amd.data.faults import DamagedSample, FaultySamples, UnreadableSample
from amd.downstream.supervised.report import damaged_warning, read_result, unreadable_warning, write_csv, write_result


class Labelled(NamedTuple):
    """A labelled data set of eight samples."""

    field: str = "data.val"
    url: str = "s3://bucket/val"
    records: Any = range(8)

    def digest(self) -> str:
        return "d1"


class Scored(NamedTuple):
    faults: FaultySamples
    figures: dict[str, float]


def unreadable(count: int) -> list[UnreadableSample]:
    return [{"record": n, "location": f"{n}.png", "reason": "truncated"} for n in range(count)]


def test_the_result_contains_the_data_the_scores_and_the_test_settings(tmp_path: Path) -> None:
    assert read_result(str(tmp_path)) is None
    damaged: list[DamagedSample] = [{"record": 5, "location": "5.mp4", "reason": "3 of 20 packets do not decode"}]
    faults = FaultySamples(unreadable(2), damaged)
    write_result(str(tmp_path), Labelled(), Scored(faults, {"eval/map": 50.0}), 12, views="2x3")
    assert read_result(str(tmp_path)) == {
        "data": "s3://bucket/val",
        "digest": "d1",
        "samples": 8,
        "unreadable": 2,
        "damaged": 1,
        "views": "2x3",
        "step": 12,
        "figures": {"eval/map": 50.0},
    }
    for name, samples in (("bad_samples.jsonl", faults.bad), ("damaged_samples.jsonl", faults.damaged)):
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == samples
    assert damaged_warning(Labelled(), damaged) == (
        "data.val: 1 of 8 samples are damaged videos, of which only the decodable frames were used; "
        "see test/damaged_samples.jsonl"
    )


def test_the_warning_lists_five_unreadable_samples_and_counts_the_rest() -> None:
    assert unreadable_warning(Labelled(), unreadable(1), "samples", "wrong") == (
        "data.val: 1 of 8 samples cannot be read and count as wrong: 0.png truncated"
    )
    text = unreadable_warning(Labelled(), unreadable(7), "key frames", "missed")
    assert text.startswith("data.val: 7 of 8 key frames cannot be read and count as missed: 0.png truncated; ")
    assert text.endswith("4.png truncated; and 2 more")


def test_values_with_commas_are_quoted(tmp_path: Path) -> None:
    write_csv(str(tmp_path / "classes.csv"), [["action", "name"], [1, "stand, still"]])
    assert (tmp_path / "classes.csv").read_text() == 'action,name\n1,"stand, still"\n'
