"""Write a detector's test reports to the run folder.

test/results.csv         video,timestamp,x1,y1,x2,y2,action,score: the input of AVA's official evaluation
test/classes.csv         action, name, number of annotations, average precision
"""

from __future__ import annotations

import io
from collections import Counter

from amd.downstream.supervised.detection.data import DetectionData, EvaluationSet
from amd.downstream.supervised.detection.evaluation import DetectionScores, boxes_of
from amd.downstream.supervised.evaluation import Predictions
from amd.downstream.supervised.report import write_csv
from amd.storage import join, write_bytes


def write_reports(folder: str, scored: DetectionScores, val: EvaluationSet, data: DetectionData) -> None:
    """Write the detections and the per-action report."""
    write_bytes(join(folder, "results.csv"), _results(scored.predictions, val, data.evaluated).encode())
    write_csv(join(folder, "classes.csv"), _classes(scored, data, val))


def _results(predictions: Predictions, val: EvaluationSet, evaluated: list[int]) -> str:
    out = io.StringIO()
    frame_ids = val.records.frame_ids
    for record, box, scores in zip(
        predictions.records.tolist(), boxes_of(predictions, val), predictions.outputs, strict=True
    ):
        place = ",".join([str(frame_ids[record]), *(f"{value:.6g}" for value in box)])
        out.writelines(f"{place},{action},{scores[action - 1]:.6g}\n" for action in evaluated)
    return out.getvalue()


def _classes(scored: DetectionScores, data: DetectionData, val: EvaluationSet) -> list[list[str | int]]:
    annotated = Counter(a for persons in val.annotated.values() for actions in persons.actions for a in actions)
    rows: list[list[str | int]] = [["action", "name", "annotated", "average_precision"]]
    for action in data.evaluated:
        precision = scored.precisions.get(action)
        shown = "" if precision is None else f"{precision:.4f}"
        rows.append([action, data.label_map.names[action], annotated[action], shown])
    return rows
