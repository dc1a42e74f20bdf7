"""Write a detector's test reports to the run folder.

test/results.csv         video,timestamp,x1,y1,x2,y2,action,score: the input of AVA's official evaluation
test/classes.csv         action, name, number of annotations, average precision
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

from amd.config import DetectionConfig
from amd.downstream.supervised.detection.data import DetectionData, EvaluationSet
from amd.downstream.supervised.detection.evaluation import BoxPredictions, DetectionScores, boxes_of
from amd.downstream.supervised.report import write_csv, write_result
from amd.storage import join, write_bytes


def write_report(
    folder: str,
    scored: DetectionScores,
    val: EvaluationSet,
    data: DetectionData,
    config: DetectionConfig,
    step: int,
    **settings: Any,
) -> None:
    """Write the detections, the per-action report and the metrics."""
    write_bytes(join(folder, "results.csv"), _results(scored.predictions, val, data.evaluated).encode())
    write_csv(join(folder, "classes.csv"), _classes(scored, data, val))
    size = list(config.evaluation.size or config.clip.size)
    write_result(folder, val, scored, step, boxes=config.data.boxes or "annotated", size=size, **settings)


def _results(predictions: BoxPredictions, val: EvaluationSet, evaluated: list[int]) -> str:
    out = io.StringIO()
    frame_ids = val.key_frames.frame_ids
    for record, box, scores in zip(
        predictions.records.tolist(), boxes_of(predictions, val), predictions.scores, strict=True
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
