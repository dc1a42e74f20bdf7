"""Tests for scheduling: quotas, fair shares, backfill and preemption, in simulations with an injected clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from service.db.models import Job
from service.jobs.execution.admission import AdmissionController
from service.jobs.execution.backfill import STOP_S, Usage
from service.jobs.execution.ray_jobs import Capacity
from service.jobs.execution.scheduling import Schedule, schedule
from service.projects.accounts import ProjectAccounts
from service.projects.schemas import ProjectPolicy
from service.projects.usage import HOUR_S, ResourceHours
from service.settings import Settings
from tests.support.service.fake_cluster import new_job

SETTINGS = Settings(max_running=20)
PROJECTS = ("a", "b", "c")
LIMIT_S = 3600.0
DEPLOYED_GPUS = {"b": 2.0}


def waiting(name: str, project: str = "a", at: float = 0.0, **fields: Any) -> Job:
    return new_job(id=name, project=project, created_at=at, not_before=at, **fields)


def running(name: str, project: str = "a", **fields: Any) -> Job:
    return waiting(name, project, state="running", **{"started_at": 0.0, "progress": {"step": 1}, **fields})


class Simulation:
    """A cluster that runs the jobs that `schedule` starts, and the queue of waiting jobs."""

    def __init__(self, cpus: float, gpus: float, policies: dict[str, ProjectPolicy], preemption: bool = False) -> None:
        self.capacity, self.policies, self.preemption = Capacity(cpus, gpus, 1e9), policies, preemption
        self.now, self.schedules = 0.0, 0
        self.waiting = list[Job]()
        self.running = dict[str, Job]()
        self.ends = dict[str, float]()
        self.duration_s = dict[str, float]()
        self.started = dict[str, float]()
        self.hours = {project: ResourceHours() for project in PROJECTS}
        self.reserved_for: str | None = None
        self.admission = self._admission()

    def submit(self, job: Job, duration_s: float) -> None:
        self.waiting.append(job)
        self.duration_s[job.id] = duration_s

    def step(self) -> Schedule:
        """Schedule at the current time, and start the chosen jobs."""
        queues = {}
        for project in PROJECTS:
            own = [job for job in self.waiting if job.project == project]
            queues[project] = iter(sorted(own, key=lambda job: (-job.priority, job.created_at, job.id)))
        self.admission = self._admission()
        decided = schedule(queues, self.admission, self.reserved_for, self.preemption)
        self.reserved_for, self.schedules = decided.reserved_for, self.schedules + 1
        for job in decided.starts:
            self.waiting.remove(job)
            job.state, job.started_at = "running", self.now
            self.running[job.id], self.ends[job.id] = job, self.now + self.duration_s[job.id]
            self.started.setdefault(job.id, self.now)
        return decided

    def advance(self, until: float) -> None:
        """Move the clock to when the next job ends, but not beyond `until`."""
        until = min([until, *self.ends.values()])
        for job in self.running.values():
            needed, hours = self.admission.needs(job), (until - self.now) / HOUR_S
            used = self.hours[job.project]
            self.hours[job.project] = ResourceHours(used.cpus + needed.cpus * hours, used.gpus + needed.gpus * hours)
        self.now = until
        for name in [name for name, end in self.ends.items() if end <= until]:
            del self.ends[name], self.running[name]

    def finish(self) -> None:
        """Run until no job is running and no waiting job can start."""
        while self.step().starts or self.ends:
            self.advance(float("inf"))

    def _admission(self) -> AdmissionController:
        accounts = ProjectAccounts(self.policies, dict(self.hours), {}, DEPLOYED_GPUS)
        return AdmissionController(SETTINGS, self.capacity, self.running.values(), accounts, self.now)


def random_job(rng: random.Random, number: int, at: float) -> tuple[Job, float]:
    """Return a job and its running time, which is at most its time limit."""
    workers = rng.choice([1, 1, 1, 2, 4])
    limit = rng.choice([None, None, 600.0, LIMIT_S])
    job = waiting(
        f"job-{number:04}",
        rng.choice(PROJECTS),
        at,
        workers=workers,
        cpus=workers * rng.choice([1.0, 2.0, 3.0]),
        device=rng.choice(["cpu", "cuda"]),
        priority=rng.choice([0, 0, 0, 5]),
        time_limit_s=limit,
    )
    return job, rng.uniform(1.0, limit or 2 * LIMIT_S)


POLICIES = {
    "a": ProjectPolicy(share=2, max_running_jobs=6, max_gpus=6),
    "b": ProjectPolicy(max_workers=5, max_gpus=6),  # deployments hold 2 of these GPUs
}


def check_limits(simulation: Simulation) -> None:
    """Check that the running jobs exceed neither the cluster's resources nor a quota."""
    held = Usage()
    for project in PROJECTS:
        jobs = [job for job in simulation.running.values() if job.project == project]
        policy = simulation.policies.get(project, ProjectPolicy())
        gpus = sum(simulation.admission.needs(job).gpus for job in jobs)
        assert len(jobs) <= (policy.max_running_jobs or len(jobs))
        assert sum(job.workers for job in jobs) <= (policy.max_workers or 10**6)
        assert not gpus or gpus + DEPLOYED_GPUS.get(project, 0.0) <= (policy.max_gpus or 10**6)
        for job in jobs:
            held = held.plus(simulation.admission.needs(job))
    assert held.fits(Usage(simulation.capacity.cpus, simulation.capacity.gpus))


def check_work_is_conserved(simulation: Simulation) -> None:
    """Check that no waiting job could have started: each has an obstacle, or waits behind its project's quota."""
    admission = simulation.admission
    for project in PROJECTS:
        own = [job for job in simulation.waiting if job.project == project]
        for job in sorted(own, key=lambda job: (-job.priority, job.created_at, job.id)):
            obstacle = admission.obstacle(job)
            assert obstacle is not None, job.id
            if obstacle.closes != "nothing":
                break


@pytest.mark.parametrize("seed", range(12))
def test_random_load_from_three_projects_exceeds_no_limit_and_leaves_no_job_waiting(seed: int) -> None:
    rng, simulation = random.Random(seed), Simulation(16.0, 8.0, POLICIES)
    arrivals = sorted(rng.uniform(0, 20 * LIMIT_S) for _ in range(120))
    for number, at in enumerate(arrivals):
        while simulation.now < at:
            simulation.step()
            check_limits(simulation)
            check_work_is_conserved(simulation)
            simulation.advance(at)
        simulation.submit(*random_job(rng, number, at))
    simulation.finish()
    assert simulation.waiting == [], "no starvation"
    assert len(simulation.started) == len(arrivals)
    assert simulation.schedules > 150


@pytest.mark.parametrize("seed", range(4))
def test_a_large_job_starts_once_the_time_limits_of_earlier_jobs_have_passed(seed: int) -> None:
    rng, simulation = random.Random(seed), Simulation(8.0, 0.0, {})
    number = 0

    def keep_full() -> None:
        nonlocal number
        while sum(job.project != "c" for job in simulation.waiting) < 12:
            number += 1
            small = waiting(f"small-{number:04}", rng.choice("ab"), simulation.now, time_limit_s=LIMIT_S)
            simulation.submit(small, rng.uniform(60.0, LIMIT_S))

    for at in range(0, 7200, 600):
        keep_full()
        simulation.step()
        simulation.advance(at)
    submitted = simulation.now
    simulation.submit(waiting("large", "c", submitted, cpus=8.0, workers=8), LIMIT_S)
    while "large" not in simulation.started:
        keep_full()
        simulation.step()
        check_limits(simulation)
        simulation.advance(simulation.now + 600)
        assert simulation.now <= submitted + LIMIT_S + STOP_S + 600, "small jobs overtake the large one"


def test_shares_divide_a_saturated_cluster() -> None:
    simulation = Simulation(12.0, 0.0, {"a": ProjectPolicy(share=2), "b": ProjectPolicy(share=1)})
    rng, number = random.Random(0), 0
    for _ in range(400):
        while len(simulation.waiting) < 40:
            number += 1
            fewest = min(PROJECTS, key=[job.project for job in simulation.waiting].count)
            simulation.submit(waiting(f"job-{number:04}", fewest, simulation.now), rng.uniform(600.0, LIMIT_S))
        simulation.step()
        simulation.advance(float("inf"))
    used = {project: hours.cpus for project, hours in simulation.hours.items()}
    assert used["a"] / used["b"] == pytest.approx(2.0, rel=0.1)
    assert used["b"] / used["c"] == pytest.approx(1.0, rel=0.1)


def decide(jobs: Sequence[Job], active: Sequence[Job], accounts: ProjectAccounts | None = None, **options: Any) -> Any:
    """Schedule on 8 CPUs and 4 GPUs at time 0. Returns the IDs to start, the reasons to wait, and the decisions."""
    admission = AdmissionController(SETTINGS, Capacity(8.0, 4.0, 1e9), active, accounts)
    queues = {project: iter([job for job in jobs if job.project == project]) for project in PROJECTS}
    decided = schedule(queues, admission, **options)
    return [job.id for job in decided.starts], {job.id: reason for job, reason in decided.waits}, decided


def test_jobs_that_end_before_a_reservation_or_use_spare_resources_are_backfilled() -> None:
    active = [running("busy", cpus=6.0, time_limit_s=LIMIT_S)]
    jobs = [
        waiting("large", cpus=7.0),
        waiting("endless", at=1.0, cpus=2.0),
        waiting("short", at=2.0, time_limit_s=600.0),
        waiting("spare", at=3.0),
    ]
    started, reasons, decided = decide(jobs, active)
    assert started == ["short", "spare"]
    assert decided.reserved_for == "large"
    assert reasons["large"] == "waiting for 7 CPUs to become free"
    assert "waiting behind a job that needs 7 CPUs" in reasons["endless"]


def test_amounts_of_one_are_in_the_singular() -> None:
    active = [running("busy", cpus=8.0, workers=2, device="cuda")]
    reasons = decide([waiting("next", device="cuda")], active)[1]
    assert reasons == {"next": "waiting for 1 CPU and 1 GPU to become free"}


def test_without_time_limits_only_resources_that_nobody_waits_for_are_backfilled() -> None:
    active = [running("busy", cpus=2.0, workers=2, device="cuda")]
    jobs = [
        waiting("large", cpus=4.0, workers=4, device="cuda"),
        waiting("other", at=1.0, workers=1, device="cuda"),
        waiting("cpu", at=2.0, cpus=2.0),
        waiting("more", at=3.0, cpus=1.0),
    ]
    started, reasons, _ = decide(jobs, active)
    assert started == ["cpu"], "8 CPUs suffice for the running job, the large one and 2 more"
    assert set(reasons) == {"large", "other", "more"}


def test_a_reservation_outlasts_changes_in_project_usage() -> None:
    active = [running("busy", "b", cpus=6.0)]
    jobs = [waiting("large", "a", cpus=4.0), waiting("small", "b", at=1.0, cpus=2.0)]
    accounts = ProjectAccounts(recent={"a": ResourceHours(cpus=100.0)})
    assert decide(jobs, active, accounts)[0] == ["small"]
    assert decide(jobs, active, accounts, reserved_for="large")[0] == []


def test_priority_takes_precedence_over_project_usage_and_job_age() -> None:
    accounts = ProjectAccounts(recent={"a": ResourceHours(cpus=100.0)})
    jobs = [waiting("urgent", "a", at=2.0, priority=1), waiting("early", "b", at=1.0), waiting("late", "c", at=3.0)]
    assert decide(jobs, [], accounts)[0] == ["urgent", "early", "late"]


def test_a_project_over_its_budget_waits_for_the_next_month() -> None:
    policy = ProjectPolicy(gpu_hours_per_month=100.0)
    accounts = ProjectAccounts({"a": policy}, month={"a": ResourceHours(gpus=120.0)})
    jobs = [waiting("gpu", device="cuda"), waiting("cpu", at=1.0), waiting("other", "b", device="cuda")]
    started, reasons, _ = decide(jobs, [], accounts)
    assert sorted(started) == ["cpu", "other"]
    assert reasons == {"gpu": "waiting for the next month: project a has used 120.0 of its 100 GPU-hours"}


def test_a_project_over_its_storage_quota_waits() -> None:
    policies = {name: ProjectPolicy(max_storage_gib=1.5) for name in ("a", "b")}
    accounts = ProjectAccounts(policies, stored={"a": 2 * 2**30, "b": 2**30, "c": 2**40})
    started, reasons, _ = decide([waiting("full", "a"), waiting("other", "b"), waiting("unlimited", "c")], [], accounts)
    assert sorted(started) == ["other", "unlimited"]
    assert reasons["full"] == (
        "waiting for free storage: project a stores 2.0 GiB and is limited to 1.5; "
        "delete jobs or encoders of the project"
    )


def test_smaller_jobs_of_a_project_do_not_overtake_one_that_waits_for_its_quota() -> None:
    accounts = ProjectAccounts({"a": ProjectPolicy(max_workers=4)})
    large, small = waiting("large", workers=4, at=1.0), waiting("small", at=2.0)
    assert decide([large, small], [running("busy", workers=2)], accounts)[0] == []
    beyond_the_quota = waiting("beyond", workers=5)
    started, reasons, _ = decide([beyond_the_quota, small], [], accounts)
    assert started == ["small"]
    assert reasons["beyond"] == "waiting for free workers: the job needs 5, and project a is limited to 4"


def test_the_newest_jobs_with_the_lowest_priority_are_preempted_if_that_suffices() -> None:
    active = [
        running("old", cpus=3.0, started_at=1.0),
        running("new", cpus=3.0, started_at=2.0),
        running("equal", cpus=2.0, priority=5),
    ]
    urgent = waiting("urgent", "b", cpus=3.0, priority=5)
    assert decide([urgent], active)[2].preempted == [], "off by default"
    assert [job.id for job in decide([urgent], active, preemption=True)[2].preempted] == ["new"]
    too_large = waiting("large", "b", cpus=7.0, priority=5)
    assert decide([too_large], active, preemption=True)[2].preempted == [], "6 CPUs do not suffice"
    active[1].state = "pausing"
    assert decide([urgent], active, preemption=True)[2].preempted == [], "one is stopping already"
