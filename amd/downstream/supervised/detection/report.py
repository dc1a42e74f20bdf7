"""Write the reports of a detector's test to the run's folder.

test/results.csv         video,timestamp,x1,y1,x2,y2,action,score: the input of AVA's official evaluation
test/classes.csv         action, name, number of annotations, average precision
test/bad_samples.jsonl   unreadable key frames
test/result.json         metrics; written last
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from typing import Any

from amd.config import DetectionConfig
from amd.downstream.supervised.detection.data import DetectionData, EvaluationSet
from amd.downstream.supervised.detection.evaluation import BoxPredictions, DetectionScores, boxes_of
from amd.storage import exists, join, read_json, write_bytes, write_json

RESULT = "result.json"


def write_report(folder: str, scored: DetectionScores, data: DetectionData, config: DetectionConfig, step: int) -> None:
    """Write the detections, the per-action report and the metrics."""
    val = data.val
    assert val is not None, "reports are written only after scoring"
    write_bytes(join(folder, "results.csv"), _results(scored.predictions, val, data.evaluated).encode())
    write_bytes(join(folder, "classes.csv"), _classes(scored, data, val).encode())
    bad = "".join(json.dumps(sample) + "\n" for sample in scored.predictions.bad)
    write_bytes(join(folder, "bad_samples.jsonl"), bad.encode())
    write_json(
        join(folder, RESULT),
        {
            "data": val.url,
            "digest": val.digest,
            "samples": len(val.key_frames),
            "unreadable": len(scored.predictions.bad),
            "boxes": config.data.boxes or "annotated",
            "size": list(config.evaluation.size or config.clip.size),
            "step": step,
            "figures": scored.figures,
        },
    )


def read_result(folder: str) -> dict[str, Any] | None:
    """Read the result of a run's test; None if it was not tested."""
    url = join(folder, RESULT)
    found: dict[str, Any] | None = read_json(url) if exists(url) else None
    return found


def _results(predictions: BoxPredictions, val: EvaluationSet, evaluated: list[int]) -> str:
    out = io.StringIO()
    frame_ids = val.key_frames.frame_ids
    for record, box, scores in zip(
        predictions.records.tolist(), boxes_of(predictions, val), predictions.scores, strict=True
    ):
        place = ",".join([str(frame_ids[record]), *(f"{value:.6g}" for value in box)])
        out.writelines(f"{place},{action},{scores[action - 1]:.6g}\n" for action in evaluated)
    return out.getvalue()


def _classes(scored: DetectionScores, data: DetectionData, val: EvaluationSet) -> str:
    annotated = Counter(a for persons in val.annotated.values() for actions in persons.actions for a in actions)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["action", "name", "annotated", "average_precision"])
    for action in data.evaluated:
        precision = scored.precisions.get(action)
        shown = "" if precision is None else f"{precision:.4f}"
        writer.writerow([action, data.label_map.names[action], annotated[action], shown])
    return out.getvalue()
