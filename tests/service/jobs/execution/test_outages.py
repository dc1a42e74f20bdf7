"""Tests for the reconciler during outages: a hung cluster or storage root costs one timeout per step."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine

from service.jobs.execution.ray_jobs import Capacity, RayJobs, RayJobStatus
from service.settings import Settings
from service.web.errors import ClusterNotResponding
from tests.support.servers.outages import HangingStorage, black_hole
from tests.support.service.fake_cluster import queued, report_status
from tests.support.service.fake_control_plane import FakeControlPlane

JOBS = 5


class SilentRay(FakeControlPlane):
    """A control plane whose cluster can stop responding; records the calls that would have waited for a timeout."""

    def silence(self) -> list[str]:
        calls = list[str]()

        def status(submission_id: str) -> RayJobStatus | None:
            calls.append(submission_id)
            raise ClusterNotResponding("Ray does not respond")

        def capacity() -> Capacity:
            calls.append("capacity")
            raise ClusterNotResponding("Ray does not respond")

        self.cluster.status, self.cluster.capacity = status, capacity  # type: ignore[method-assign]
        return calls


def test_an_unresponsive_cluster_costs_one_timeout_per_step(engine: Engine, tmp_path: Path) -> None:
    plane = SilentRay(engine, tmp_path, max_running=JOBS)
    plane.cluster.total = plane.cluster.total._replace(cpus=100.0)
    jobs = [plane.running() for _ in range(JOBS)]
    waiting = queued(plane.store)
    calls = plane.silence()
    plane.step()
    assert len(calls) == 1
    assert all("does not respond" in plane.now(job).message for job in (*jobs, waiting))
    report_status(plane.root, plane.now(jobs[0]), "succeeded")
    plane.step()
    assert len(calls) == 2
    assert plane.now(jobs[0]).state == "succeeded", "the outcome on the storage root suffices"


def test_a_ray_server_that_accepts_connections_but_never_responds_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.execution.ray_jobs.TIMEOUT_S", 0.2)
    with black_hole() as port:
        cluster = RayJobs(f"http://127.0.0.1:{port}", None, "python")
        for call in (cluster.capacity, lambda: cluster.status("a"), lambda: cluster.stop("a")):
            with pytest.raises(ClusterNotResponding, match=f"Ray at http://127.0.0.1:{port} does not respond"):
                call()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_hung_storage_costs_one_timeout_per_step_and_delays_only_jobs_that_need_it(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    plane = FakeControlPlane(sqlite_engine, tmp_path, max_running=JOBS + 1)
    plane.storage_timeout_s = 2.0
    plane.root = f"hanging://disk{tmp_path}"
    plane.settings = Settings(storage=plane.root, data_dir=tmp_path, max_running=JOBS + 1)
    plane.reconciler = plane.replica()
    plane.cluster.total = plane.cluster.total._replace(cpus=100.0)
    jobs = [plane.running() for _ in range(JOBS)]
    waiting = queued(plane.store)
    with HangingStorage.outage():
        done = threading.Event()
        stepping = threading.Thread(target=lambda: (plane.reconciler.step(), done.set()))
        stepping.start()
        assert done.wait(30), "a step must end while the storage root hangs"
        assert HangingStorage.calls == JOBS, "the calls of all jobs wait at the same time"
        assert plane.now(waiting).state == "queued", "its config cannot be stored"
        assert [plane.now(job).state for job in jobs] == ["running"] * JOBS
    while plane.reconciler._storage.running:
        pass
    report_status(plane.root, plane.now(jobs[0]), "succeeded")
    plane.step()
    assert plane.now(jobs[0]).state == "succeeded"
    assert plane.now(waiting).state == "starting"
