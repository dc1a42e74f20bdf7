"""Test results in the run folder, written by every kind of supervised run.

test/bad_samples.jsonl       unreadable samples
test/damaged_samples.jsonl   videos for which only the decodable frames were used
test/result.json             metrics; written last
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from amd.data.faults import DamagedSample, UnreadableSample
from amd.downstream.supervised.evaluation import EvaluationData, EvaluationScores
from amd.storage import exists, join, read_json, write_bytes, write_json, write_json_lines
from amd.training.run_folder import BAD_SAMPLES, DAMAGED_SAMPLES

TEST, RESULT = "test", "result.json"
LISTED_SAMPLES = 5  # unreadable samples listed in a warning


def write_result(folder: str, data: EvaluationData, scored: EvaluationScores, step: int, **settings: Any) -> None:
    """Write the list of unreadable samples, and the metrics together with the `settings` of the test."""
    for name, samples in ((BAD_SAMPLES, scored.faults.bad), (DAMAGED_SAMPLES, scored.faults.damaged)):
        write_json_lines(join(folder, name), samples)
    write_json(
        join(folder, RESULT),
        {
            "data": data.url,
            "digest": data.digest(),
            "samples": len(data.records),
            "unreadable": len(scored.faults.bad),
            "damaged": len(scored.faults.damaged),
            **settings,
            "step": step,
            "figures": scored.figures,
        },
    )


def read_result(folder: str) -> dict[str, Any] | None:
    """Read a run's test result; return None if the run has not been tested."""
    url = join(folder, RESULT)
    found: dict[str, Any] | None = read_json(url) if exists(url) else None
    return found


def write_csv(url: str, rows: Iterable[Iterable[Any]]) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    write_bytes(url, out.getvalue().encode())


def selection_warning(data: EvaluationData) -> str:
    """Return a warning that the best checkpoint was chosen on the test set."""
    return (
        f"{data.field}={data.url} is also the validation set: the best checkpoint was chosen on it, which "
        "overestimates its score; evaluation.checkpoint=last tests the last one"
    )


def unreadable_warning(data: EvaluationData, bad: list[UnreadableSample], unit: str, counted_as: str) -> str:
    """Return a warning that counts the unreadable samples, lists the first few, and states how they are scored."""
    names = "; ".join(f"{sample['location']} {sample['reason']}" for sample in bad[:LISTED_SAMPLES])
    more = f"; and {len(bad) - LISTED_SAMPLES} more" if len(bad) > LISTED_SAMPLES else ""
    count = f"{len(bad)} of {len(data.records)} {unit}"
    return f"{data.field}: {count} cannot be read and count as {counted_as}: {names}{more}"


def damaged_warning(data: EvaluationData, damaged: list[DamagedSample]) -> str:
    """Return a warning that states how many samples are damaged and where they are listed."""
    return (
        f"{data.field}: {len(damaged)} of {len(data.records)} samples are damaged videos, of which only the decodable "
        f"frames were used; see {TEST}/{DAMAGED_SAMPLES}"
    )
