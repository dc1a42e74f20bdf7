"""Tests for the texts that describe a job in the terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from service.cli.job_views import details_table
from service.jobs.schemas import JobDetail

FOLDER = "/root/runs/train-1"
FACTS = {"id": "train-1", "state": "succeeded", "reason": None, "message": "", "kind": "train", "project": "default"}
EMPTY = {"preset": None, "name": None, "labels": {}, "progress": None, "encoder": None, "failure": None}
MORE = {"attempt": 1, "max_retries": 3, "created_by": "key-1", "allowed_actions": [], "run_folder": FOLDER}


def shown(result: dict[str, Any] | None) -> str:
    """Return the table of `amd jobs show` for a job with this result."""
    created = datetime.now(UTC)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(
            details_table(JobDetail.model_construct(**FACTS, **EMPTY, **MORE, created_at=created, result=result))
        )
    return capture.get()


def test_unreadable_samples_are_counted_with_the_file_that_lists_them() -> None:
    assert f"2, listed in {FOLDER}/bad_samples.jsonl" in shown({"figures": {"data/bad_samples": 2.0}})


@pytest.mark.parametrize("result", [{"figures": {"data/bad_samples": 0.0}}, {"figures": {}}, {"best": None}, None])
def test_a_job_without_unreadable_samples_shows_no_count(result: dict[str, Any] | None) -> None:
    assert "bad samples" not in shown(result)
