"""Files in a run's folder that record its test, for every kind of supervised run.

test/bad_samples.jsonl   unreadable samples
test/result.json         metrics; written last
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from amd.data.faults import UnreadableSample
from amd.downstream.supervised.evaluation import EvaluationData, EvaluationScores
from amd.storage import exists, join, read_json, write_bytes, write_json

TEST, RESULT = "test", "result.json"
LISTED_SAMPLES = 5  # unreadable samples listed in a warning


def write_result(folder: str, data: EvaluationData, scored: EvaluationScores, step: int, **settings: Any) -> None:
    """Write the list of unreadable samples, and the metrics together with the `settings` of the test."""
    bad = "".join(json.dumps(sample) + "\n" for sample in scored.bad)
    write_bytes(join(folder, "bad_samples.jsonl"), bad.encode())
    write_json(
        join(folder, RESULT),
        {
            "data": data.url,
            "digest": data.digest(),
            "samples": len(data.records),
            "unreadable": len(scored.bad),
            **settings,
            "step": step,
            "figures": scored.figures,
        },
    )


def read_result(folder: str) -> dict[str, Any] | None:
    """Read the result of a run's test; None if it was not tested."""
    url = join(folder, RESULT)
    found: dict[str, Any] | None = read_json(url) if exists(url) else None
    return found


def write_csv(url: str, rows: Iterable[Iterable[Any]]) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    write_bytes(url, out.getvalue().encode())


def selection_warning(data: EvaluationData) -> str:
    """Return a warning that the test set is also the data on which the best checkpoint was chosen."""
    return (
        f"{data.field}={data.url} is also the validation set: the best checkpoint was chosen on it, which "
        "overestimates its score; evaluation.checkpoint=last tests the last one"
    )


def unreadable_warning(data: EvaluationData, bad: list[UnreadableSample], unit: str, counted_as: str) -> str:
    """Return a warning that lists unreadable samples: how many of which `unit`, and as what they count."""
    names = "; ".join(f"{sample['location']} {sample['reason']}" for sample in bad[:LISTED_SAMPLES])
    more = f"; and {len(bad) - LISTED_SAMPLES} more" if len(bad) > LISTED_SAMPLES else ""
    count = f"{len(bad)} of {len(data.records)} {unit}"
    return f"{data.field}: {count} cannot be read and count as {counted_as}: {names}{more}"
