"""What a detector's test leaves in its run's folder, for people and programs.

    test/results.csv         video,timestamp,x1,y1,x2,y2,action,score: what AVA's own evaluation reads
    test/classes.csv         action, name, how often it is annotated, its average precision
    test/bad_samples.jsonl   key frames that could not be read
    test/result.json         figures; written last

Knows nothing of networks or ranks.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from typing import Any

from amd.config import DetectionConfig
from amd.downstream.supervised.detection.data import DetectionData, Scene
from amd.downstream.supervised.detection.evaluation import Scored, Seen, boxes_of
from amd.storage import exists, join, read_json, write_bytes, write_json

RESULT = "result.json"


def write_report(folder: str, scored: Scored, data: DetectionData, config: DetectionConfig, step: int) -> None:
    """The figures, and where they come from."""
    scene = data.scene
    assert scene is not None, "only what was scored is reported"
    write_bytes(join(folder, "results.csv"), _results(scored.seen, scene, data.evaluated).encode())
    write_bytes(join(folder, "classes.csv"), _classes(scored, data, scene).encode())
    bad = "".join(json.dumps(sample) + "\n" for sample in scored.seen.bad)
    write_bytes(join(folder, "bad_samples.jsonl"), bad.encode())
    write_json(
        join(folder, RESULT),
        {
            "data": scene.url,
            "digest": scene.digest,
            "samples": len(scene.looked_at),
            "unreadable": len(scored.seen.bad),
            "boxes": config.data.boxes or "annotated",
            "size": list(config.evaluation.size or config.clip.size),
            "step": step,
            "figures": scored.figures,
        },
    )


def read_result(folder: str) -> dict[str, Any] | None:
    """The figures of a run's test, if it was tested."""
    url = join(folder, RESULT)
    found: dict[str, Any] | None = read_json(url) if exists(url) else None
    return found


def _results(seen: Seen, scene: Scene, evaluated: list[int]) -> str:
    out = io.StringIO()
    moments = scene.looked_at.moments
    for record, box, scores in zip(seen.records.tolist(), boxes_of(seen, scene), seen.scores, strict=True):
        place = ",".join([str(moments[record]), *(f"{value:.6g}" for value in box)])
        out.writelines(f"{place},{action},{scores[action - 1]:.6g}\n" for action in evaluated)
    return out.getvalue()


def _classes(scored: Scored, data: DetectionData, scene: Scene) -> str:
    annotated = Counter(a for persons in scene.annotated.values() for actions in persons.actions for a in actions)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["action", "name", "annotated", "average_precision"])
    for action in data.evaluated:
        precision = scored.precisions.get(action)
        shown = "" if precision is None else f"{precision:.4f}"
        writer.writerow([action, data.label_map.names[action], annotated[action], shown])
    return out.getvalue()
