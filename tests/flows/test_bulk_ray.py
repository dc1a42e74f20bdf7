"""Tests for bulk embedding with several Ray actors."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from amd.downstream.embedding.bulk import EmbedResult, embed_all
from amd.downstream.embedding.features import embed_file
from tests.amd.downstream.embedding.test_bulk import ENCODER, assert_each_record_once, config, rows_of, start
from tests.amd.downstream.embedding.test_features import write_images
from tests.support.ray_cluster import RayCluster
from tests.support.service.control_plane import wait_for

pytestmark = pytest.mark.ray


def test_bulk_embedding_resumes_after_a_stop_request_and_writes_each_record_once(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    files = sorted(write_images(tmp_path / "images", 10))
    Path(files[7]).write_bytes(b"not a picture")
    settings = config(tmp_path, rows_per_file=1, scaling={"device": "cpu", "workers": 2})
    process, folder = start(tmp_path, settings, local=False), tmp_path / "out" / "embeddings"
    until = time.monotonic() + 120
    while len(list(folder.glob("*.parquet"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stopped = result_of(process)
    assert (stopped.state, process.returncode) == ("cancelled", 1)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 2 <= len(before) < 10
    ended = embed_all(settings, local=True)  # resumes where the actors stopped
    assert (ended.state, ended.samples, ended.bad) == ("succeeded", 9, 1)
    assert_each_record_once(ended.output)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = rows_of(ended.output)
    for row in (0, 6, 7, 8):
        expected = embed_file(str(tmp_path / "encoders" / ENCODER), found["location"][row])
        np.testing.assert_allclose(found["embedding"][row], expected, rtol=0, atol=1e-5)


def test_lost_workers_are_replaced_as_long_as_the_job_makes_progress(ray_cluster: RayCluster, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 24)
    scaling = {"device": "cpu", "workers": 1, "retries": {"infrastructure": 1}}
    process = start(tmp_path, config(tmp_path, rows_per_file=1, scaling=scaling), local=False)
    folder, finished = tmp_path / "out" / "embeddings", 0
    for _ in range(2):  # more often than the budget allows without progress
        wait_for(lambda: len(list(folder.glob("*.parquet"))) > finished)  # noqa: B023  called before the next loop
        for worker in span_workers():
            worker.kill()
        finished = len(list(folder.glob("*.parquet"))) + 1
    ended = result_of(process)
    assert (ended.state, ended.samples) == ("succeeded", 24)
    assert_each_record_once(ended.output)


def span_workers() -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"])  # None for a process that is ending
    return [process for process in found if (process.info["cmdline"] or [""])[0].startswith("ray::SpanWorker")]


def result_of(process: subprocess.Popen[str]) -> EmbedResult:
    """Parse the last line of the output, because Ray may print other lines before it."""
    return EmbedResult.model_validate_json(process.communicate(timeout=120)[0].splitlines()[-1])
