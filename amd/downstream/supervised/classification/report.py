"""Write a classifier's test reports to the run folder.

test/views-0000.parquet     one row per view: sample, label, segment, crop, logits; one file per rank
test/samples.parquet        one row per sample: label, prediction, probabilities, number of views
test/confusion.csv          rows: true class, columns: predicted class (single label only)
test/classes.csv            number of samples, recall and precision per class
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from amd.config import FinetuneConfig, ViewsConfig
from amd.downstream.supervised.classification import metrics
from amd.downstream.supervised.classification.data import LabelledSplit
from amd.downstream.supervised.classification.evaluation import ClassificationScores
from amd.downstream.supervised.evaluation import Predictions
from amd.downstream.supervised.report import write_csv
from amd.storage import join, write_bytes


def write_views(folder: str, predictions: Predictions, split: LabelledSplit, views: ViewsConfig, rank: int) -> None:
    """Write one rank's views with their logits."""
    columns = {
        "sample": [split.records[int(record)].name for record in predictions.records],
        "record": predictions.records,
        "label": _labels(split, predictions.records),
        "segment": predictions.numbers // views.crops,
        "crop": predictions.numbers % views.crops,
        "logits": list(predictions.outputs),
    }
    _parquet(join(folder, f"views-{rank:04d}.parquet"), columns)


def write_reports(folder: str, scored: ClassificationScores, split: LabelledSplit, config: FinetuneConfig) -> None:
    """Write the per-sample and per-class reports."""
    merged = scored.merged
    columns = {
        "sample": [split.records[int(record)].name for record in merged.records],
        "label": _labels(split, merged.records),
        "prediction": merged.probabilities.argmax(axis=1),
        "probabilities": list(merged.probabilities.astype(np.float32)),
        "views": merged.views,
    }
    _parquet(join(folder, "samples.parquet"), columns)
    if not config.head.multi_label and len(merged.records):
        classes = merged.probabilities.shape[1]
        matrix = metrics.confusion(merged.probabilities.argmax(axis=1), scored.truth, classes)
        write_csv(join(folder, "confusion.csv"), matrix.tolist())
        rows = metrics.class_report(matrix, split.names)
        write_csv(join(folder, "classes.csv"), [rows[0], *(row.values() for row in rows)])


def _labels(split: LabelledSplit, records: Any) -> list[Any]:
    if split.sets is None:
        return [int(label) for label in split.labels[records]]
    return [split.sets[int(record)].tolist() for record in records]


def _parquet(url: str, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    write_bytes(url, out.getvalue())
