"""Helpers that write the output of an embed job: vectors for scikit-learn's digits, thumbnails and a map."""

from __future__ import annotations

import time

import numpy as np
import torch
from sklearn.datasets import load_digits

from amd.downstream.embedding.files import EmbeddingIndex, SpanFile, plan_spans, unit, write_index, write_rows
from amd.downstream.embedding.layout import compute_map
from amd.downstream.embedding.map_files import write_map, write_thumbnails
from amd.downstream.embedding.thumbnails import encode_thumbnail
from service.jobs.execution.protocol import JobFolder
from service.jobs.store import JobStore
from tests.support.service.fake_cluster import queued

HOSTILE = "/data/digits/\u202e<img src=x onerror='window.hacked = 1'>.png"
UNREADABLE = 3  # number of the record that could not be read


def add_embedded_digits(store: JobStore, root: str, count: int, seed: int = 0, **job: object) -> str:
    """Add an embed job that has succeeded, with its output. Returns the job's ID."""
    now = time.time()
    values = {"kind": "embed", "state": "succeeded", "attempt": 1, "started_at": now, "ended_at": now, **job}
    job_id = queued(store, **values).id
    write_embedded_digits(JobFolder(root, job_id).output, count, seed)
    return job_id


def write_embedded_digits(output: str, count: int, seed: int = 0) -> None:
    """Write vectors, thumbnails, a map and an index. The first location is hostile; record UNREADABLE has no row."""
    digits = load_digits()
    chosen = np.arange(count) % len(digits.target)
    pictures = (digits.images[chosen] * 15.9).astype(np.uint8)
    noise = np.random.default_rng(seed)
    mixing = noise.normal(size=(64, 24)) / 8
    vectors = unit(np.tanh(digits.data[chosen] / 8 @ mixing).astype(np.float32))
    files = []
    for span in plan_spans(count, 512):
        records = np.array([record for record in span if record != UNREADABLE], np.int64)
        names = [location_of(record) for record in records.tolist()]
        write_rows(output, span, vectors[records], records, digits.target[chosen[records]].astype(np.int64), names)
        images = {record: _thumbnail(pictures[record]) for record in records.tolist()}
        write_thumbnails(output, span, images)
        files.append(SpanFile(start=span.start, stop=span.stop, rows=len(records), file="x.parquet"))
    spans = [file.span for file in files]
    write_map(output, compute_map(output, spans, count - 1, encoder=f"digits-{seed}", layout="pca", clusters=10))
    write_index(
        output,
        EmbeddingIndex(
            encoder=f"digits-{seed}",
            sha256="abc",
            data="/data/digits",
            digest="def",
            samples=count,
            count=count - 1,
            width=vectors.shape[1],
            normalize=False,
            bad=({"record": UNREADABLE, "location": location_of(UNREADABLE), "reason": "is not an image"},),
            thumbnails=True,
            files=tuple(files),
            made_of={},
        ),
    )


def location_of(record: int) -> str:
    return HOSTILE if record == 0 else f"/data/digits/{record:06d}.png"


def _thumbnail(picture: np.ndarray) -> bytes:
    enlarged = np.kron(picture, np.ones((4, 4), np.uint8))
    return encode_thumbnail(torch.from_numpy(np.stack([enlarged] * 3, axis=-1)[None]))
