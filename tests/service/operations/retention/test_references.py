"""Tests for finding references in documents: IDs and paths below the storage root, in any form that a config allows."""

from __future__ import annotations

import pytest

from service.operations.retention.references import reachable, references

IDS = {"train-1", "train-2", "search-1-0000-s0", "import-1"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("train-1", {"train-1"}),
        ("/data/root/runs/train-1/checkpoints/step-00000010", {"train-1"}),
        ("s3://bucket/root/encoders/import-1", {"import-1"}),
        ("jobs/train-2/output/{000..099}.tar", {"train-2"}),
        ("data.train=/root/jobs/train-2/output", {"train-2"}),
        ("/root/runs/train-*/logs", {"train-1", "train-2"}),
        ("/root/runs/train-{1,2}/checkpoints", {"train-1", "train-2"}),
        ("/a/jobs/train-1/x,/a/jobs/train-2/y", {"train-1", "train-2"}),
        ("train-10", set()),
        ("/root/runs/train-10", set()),
        ("the run train-1 of yesterday", set()),
    ],
)
def test_a_string_refers_to_ids_and_to_paths_that_contain_them(text: str, found: set[str]) -> None:
    assert references({"config": [{"weights": text}], "steps": 3}, IDS) == found
    assert references({text: None}, IDS) == found


def test_reachable_ids_include_indirect_references_and_tolerate_cycles() -> None:
    links = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert reachable(["a"], lambda ids: set().union(*(links[id] for id in ids))) == {"a", "b", "c"}
