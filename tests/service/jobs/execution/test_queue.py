"""Tests that each project's queue is read in order, completely, and only as far as needed."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from sqlalchemy import Engine, event, insert

from service.db.models import Job
from service.jobs.execution import queue as queues
from service.jobs.execution.queue import Exclusions, JobQueue
from service.jobs.execution.scheduling import MAX_WAITS
from service.jobs.store import JobStore
from tests.support.service.fake_cluster import new_job
from tests.support.service.fake_control_plane import FakeControlPlane

JOBS = 60


def add_many(engine: Engine, jobs: list[Job]) -> None:
    columns = Job.__table__.columns
    rows = [{column.name: getattr(job, column.name) for column in columns} | {"version": 1} for job in jobs]
    with engine.begin() as connection:
        connection.execute(insert(Job), rows)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "FIRST_PAGE", 3)
    monkeypatch.setattr(queues, "PAGE", 7)


def random_jobs(rng: random.Random) -> list[Job]:
    return [
        new_job(
            id=f"job-{number:03}",
            priority=rng.choice([-5, 0, 0, 0, 9]),
            state=rng.choice(["queued", "queued", "retrying", "running", "paused"]),
            created_at=rng.choice([1.0, 2.0, 3.0]),
            not_before=rng.choice([0.0, 0.0, 50.0]),
            project=rng.choice(["a", "b"]),
            workers=rng.choice([1, 4]),
            cpus=rng.choice([1.0, 64.0]),
            device=rng.choice(["cpu", "cuda", "auto"]),
        )
        for number in range(JOBS)
    ]


def test_jobs_that_are_due_are_read_by_priority_and_then_by_age(engine: Engine) -> None:
    jobs = random_jobs(random.Random(0))
    add_many(engine, jobs)
    due = [job for job in jobs if job.state in ("queued", "retrying") and job.not_before <= 10]
    assert JobQueue(engine).projects() == {"a", "b"}
    for project in ("a", "b"):
        own = [job for job in due if job.project == project]
        expected = sorted(own, key=lambda job: (-job.priority, job.created_at, job.id))
        assert [job.id for job in JobQueue(engine).waiting(project, now=10)] == [job.id for job in expected]


def test_excluded_jobs_are_skipped_after_the_first_page(engine: Engine) -> None:
    jobs = random_jobs(random.Random(1))
    add_many(engine, jobs)
    exclusions = Exclusions(max_workers=2, max_cpus=32.0, max_gpus=2.0)
    found = list(JobQueue(engine).waiting("b", 10, lambda: exclusions))
    may_start = [
        job.id
        for job in jobs
        if job.state in ("queued", "retrying") and job.not_before <= 10 and job.cpus <= 32
        if job.project == "b" and job.workers <= 2
    ]
    assert may_start
    assert set(may_start) <= {job.id for job in found}
    others = [job for job in found if job.id not in may_start]
    assert len(others) <= 2 * queues.FIRST_PAGE, "only jobs on the first page of each state"


def test_a_step_reads_only_the_beginning_of_a_long_queue(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path, max_running=2)
    jobs = [new_job(id=f"job-{number:05}", created_at=float(number), not_before=0.0) for number in range(2000)]
    add_many(engine, jobs)
    loaded = list[str]()

    def note(job: Job, _: object) -> None:
        loaded.append(job.id)

    event.listen(Job, "load", note)
    try:
        plane.step()
    finally:
        event.remove(Job, "load", note)
    assert plane.cluster.submitted == ["job-00000", "job-00001"]
    assert len(loaded) < 100


def test_a_step_reads_the_beginning_of_a_long_queue_behind_a_blocked_job(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path)
    plane.running(cpus=3.0)
    small = [new_job(id=f"job-{number:05}", created_at=float(number), not_before=0.0) for number in range(2000)]
    add_many(engine, [new_job(id="large", cpus=4.0, created_at=-1.0, not_before=0.0), *small])
    loaded = list[str]()

    def note(job: Job, _: object) -> None:
        loaded.append(job.id)

    event.listen(Job, "load", note)
    try:
        plane.step()
    finally:
        event.remove(Job, "load", note)
    assert "waiting behind a job that needs 4 CPUs" in plane.now(small[0]).message
    assert len(loaded) < 2 * MAX_WAITS


def test_a_project_at_its_limit_does_not_hide_the_jobs_of_other_projects(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path, project_max_running=1)
    first = [new_job(id=f"a-{number:04}", created_at=float(number), not_before=0.0) for number in range(500)]
    other = new_job(id="b-0000", project="b", created_at=1e6, not_before=0.0)
    add_many(engine, [*first, other])
    plane.step()
    assert plane.cluster.submitted == ["a-0000", "b-0000"]
    told = [job for job in map(plane.now, first) if job.message]
    assert 0 < len(told) <= 2 * queues.FIRST_PAGE


def test_jobs_beyond_the_worker_quota_do_not_hide_the_jobs_behind_them(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path, project_max_workers=2)
    large = [
        new_job(id=f"large-{number:04}", workers=3, created_at=float(number), not_before=0.0)
        for number in range(2 * MAX_WAITS)
    ]
    add_many(engine, [*large, new_job(id="small", created_at=1e6, not_before=0.0)])
    plane.step()
    assert plane.cluster.submitted == ["small"]


def test_queued_and_retrying_jobs_are_merged_in_order(engine: Engine) -> None:
    jobs = [new_job(id=f"{state}-{at}", state=state, created_at=float(at), not_before=0.0)
            for state, at in itertools.product(("queued", "retrying"), range(20))]  # fmt: skip
    add_many(engine, jobs)
    found = [job.created_at for job in JobQueue(engine).waiting("default", 1e9)]
    assert found == sorted(found)
    assert len(found) == 40
    assert JobStore(engine).counts() == {("train", "queued"): 20, ("train", "retrying"): 20}
