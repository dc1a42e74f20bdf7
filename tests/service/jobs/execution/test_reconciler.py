"""Tests for the reconciler with a fake cluster: transitions, retries, stop requests, admission and faults."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from amd.artifacts.discovery import encoder_folder
from amd.storage import read_json
from service.db.models import Job
from service.jobs.actions import act
from service.jobs.execution.protocol import RETRYABLE, JobFolder, request_digest
from service.jobs.execution.ray_jobs import RayJobStatus
from service.jobs.schemas import ACTIVE, ENDED
from service.projects.schemas import ProjectPolicy, StorageCredential
from service.projects.store import ProjectStore
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from service.web.errors import IllegalAction, NotFound
from tests.support.encoders.encoder_cards import publish
from tests.support.service.fake_cluster import queued, report_status
from tests.support.service.fake_control_plane import FakeControlPlane


@pytest.fixture
def plane(engine: Engine, tmp_path: Path) -> FakeControlPlane:
    return FakeControlPlane(engine, tmp_path)


def test_every_transition_of_a_job_from_queued_to_succeeded_is_recorded_as_an_event(plane: FakeControlPlane) -> None:
    job = plane.running()
    assert job.progress == {"step": 3, "steps": 10}
    report_status(plane.root, job, "succeeded", result={"encoder_folder": "x/encoders/e"})
    plane.step()
    done = plane.now(job)
    assert (done.state, done.attempt, done.result) == ("succeeded", 1, {"encoder_folder": "x/encoders/e"})
    assert done.ended_at is not None
    assert [event.type for event in plane.store.events(job.id)] == ["created", "starting", "running", "succeeded"]
    assert [event.version for event in plane.store.events(job.id)] == [1, 2, 3, 4]
    assert plane.cluster.submitted == [job.id]
    assert [(attempt.number, attempt.state) for attempt in plane.store.attempts(job.id)] == [(1, "succeeded")]


def test_the_drivers_policy_is_passed_with_the_submission(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path, allowed_uris=("s3://bucket/sets", f"file://{tmp_path}/a/../data/"))
    job = queued(plane.store, config={"seed": 1, "data": {"train": "ü"}, "lr": 1e-5})
    plane.step()
    policy, folder = plane.cluster.policies[job.id], JobFolder(plane.root, job.id)
    assert policy.allowed_uris == ("s3://bucket/sets", f"{tmp_path}/data")
    assert policy.digest == request_digest(read_json(folder.request)["kind"], read_json(folder.config))
    assert policy.digest != request_digest("embed", job.config)


def test_a_job_is_submitted_with_the_storage_credentials_of_its_project(plane: FakeControlPlane) -> None:
    credentials = {"sets": StorageCredential(prefixes=["s3://bucket/sets"], secret="file:/secrets/sets")}
    ProjectStore(plane.store.engine).put("video", ProjectPolicy(credentials=credentials), "test")
    jobs = [queued(plane.store, project=project) for project in ("video", "audio")]
    plane.step()
    assert [plane.cluster.policies[job.id].credentials for job in jobs] == [credentials, {}]


def test_a_published_encoder_is_registered_when_its_job_succeeds(
    plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = plane.running()
    publish(plane.root, job.id)
    monkeypatch.setattr(EncoderDiscovery, "scan", lambda self: None)  # the scan must not register it instead
    report_status(plane.root, job, "succeeded", result={"encoder_folder": encoder_folder(plane.root, job.id)})
    plane.step()
    assert plane.now(job).state == "succeeded"
    assert EncoderStore(plane.store.engine).get(job.id).job_id == job.id


def test_the_outcome_reported_by_an_attempt_takes_precedence_over_its_ray_status(plane: FakeControlPlane) -> None:
    job = plane.running()
    plane.cluster.jobs[job.id] = plane.cluster.jobs[job.id]._replace(status="FAILED", message="head restarted")
    plane.step()
    assert plane.now(job).state == "running", "its outcome may still arrive"
    report_status(plane.root, job, "succeeded")
    plane.step()
    assert plane.now(job).state == "succeeded"


def test_an_attempt_that_sends_heartbeats_is_alive_even_if_ray_does_not_know_it(plane: FakeControlPlane) -> None:
    job = plane.running()
    plane.cluster.jobs.clear()
    for _ in range(5):
        plane.offset_s += 50
        report_status(plane.root, job)
        plane.step()
        assert plane.now(job).state == "running"
    for _ in range(2):
        plane.offset_s += 50
        plane.step()
    assert (plane.now(job).state, plane.now(job).reason) == ("retrying", "node_lost")


def test_infrastructure_failures_but_not_user_errors_are_retried_with_backoff(plane: FakeControlPlane) -> None:
    job = plane.running()
    report_status(plane.root, job, "failed", "node_lost", message="lost")
    plane.step()
    assert plane.now(job).state == "retrying"
    plane.step()
    assert plane.now(job).attempt == 1, "the retry waits for the backoff"
    plane.offset_s += 6
    plane.step()
    job = plane.now(job)
    assert (job.state, job.attempt) == ("starting", 2)
    assert plane.cluster.submitted[-1] == f"{job.id}-2"
    report_status(plane.root, job, "failed", "node_lost")
    plane.step()
    plane.offset_s += 6
    plane.step()
    assert plane.now(job).attempt == 2, "the second backoff is longer"
    plane.offset_s += 6
    plane.step()
    job = plane.now(job)
    assert job.attempt == 3
    report_status(plane.root, job, "failed", "storage_unreachable", message="unreachable")
    plane.step()
    assert (plane.now(job).state, plane.now(job).reason) == ("failed", "storage_unreachable"), "max_retries=2"
    assert plane.now(job).message == "unreachable; failure 3, max_retries=2 allows no more"

    other = plane.running()
    report_status(plane.root, other, "failed", "config_invalid", message="bad")
    plane.step()
    assert (plane.now(other).state, plane.now(other).message) == ("failed", "bad")
    again = act(plane.store, other.id, None, "retry", "me")
    assert (again.state, again.retries, again.reason) == ("queued", 0, None)
    plane.step()
    assert plane.now(other).attempt == 2


@pytest.mark.parametrize(("action", "ends"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_stop_request_is_repeated_until_the_attempt_ends_and_frees_its_resources(
    plane: FakeControlPlane, action: Any, ends: str
) -> None:
    job = plane.running(cpus=4.0)
    behind = queued(plane.store, cpus=4.0)
    plane.step()
    assert plane.now(behind).message == "waiting for 4 CPUs to become free"
    stopping = act(plane.store, job.id, None, action, "me")
    assert stopping.state in ("cancelling", "pausing")
    assert act(plane.store, job.id, None, action, "me").version == stopping.version, (
        "repeating the request changes nothing"
    )
    plane.step(2)
    assert plane.cluster.stopped == [job.id]
    plane.offset_s += 11
    plane.step()
    assert plane.cluster.stopped == [job.id, job.id]
    report_status(plane.root, job, "cancelled", "cancelled_by_user", message="stopped after step 3", asked_to_stop=True)
    plane.step()
    assert plane.now(job).state == ends
    assert plane.now(behind).state == "starting"


def test_the_stop_deadline_is_taken_from_the_request_or_else_from_the_config(plane: FakeControlPlane) -> None:
    """Check that the config's deadline is extended by the time that the workers need to report back."""
    for deadline_s, seconds in ((5.0, 5.0), (None, 60.0)):
        job = plane.running()
        act(plane.store, job.id, None, "cancel", "me", deadline_s)
        plane.step()
        limit = JobFolder(plane.root, job.id).read_stop_deadline(1)
        assert limit is not None
        assert seconds - 2 < limit <= seconds


def test_a_driver_that_cannot_start_is_reported_with_the_last_line_of_its_traceback(plane: FakeControlPlane) -> None:
    job = queued(plane.store)
    plane.step()
    trace = "Traceback (most recent call last):\n  …\nModuleNotFoundError: No module named 'service'\n"
    plane.cluster.jobs[job.id] = RayJobStatus("FAILED", trace)
    plane.step()
    plane.offset_s += 30
    plane.step()
    assert plane.now(job).state == "retrying"
    expected = "the driver could not start: ModuleNotFoundError: No module named 'service'"
    assert expected in plane.now(job).message


def test_a_paused_job_resumes_as_a_new_attempt(plane: FakeControlPlane) -> None:
    job = plane.running()
    act(plane.store, job.id, None, "pause", "me")
    report_status(plane.root, job, "cancelled", "cancelled_by_user", asked_to_stop=True)
    plane.step()
    act(plane.store, job.id, None, "resume", "me")
    plane.step()
    assert (plane.now(job).state, plane.now(job).attempt) == ("starting", 2)


def test_a_job_that_succeeds_while_being_cancelled_ends_as_succeeded(plane: FakeControlPlane) -> None:
    job = plane.running()
    act(plane.store, job.id, None, "cancel", "me")
    report_status(plane.root, job, "succeeded")
    plane.step()
    assert plane.now(job).state == "succeeded"


def test_a_job_is_requeued_if_its_node_is_lost_but_not_if_it_was_stopped_through_ray(plane: FakeControlPlane) -> None:
    job = plane.running()
    report_status(plane.root, job, "cancelled", "cancelled_by_user", asked_to_stop=True)
    plane.step()
    assert (plane.now(job).state, plane.now(job).retries) == ("queued", 0)
    other = plane.running()
    plane.cluster.jobs[other.id] = plane.cluster.jobs[other.id]._replace(status="STOPPED")
    report_status(plane.root, other, "cancelled", "cancelled_by_user", asked_to_stop=True)
    plane.step()
    assert plane.now(other).state == "cancelled"


def test_progress_is_discarded_if_the_job_has_changed_since_it_was_read(plane: FakeControlPlane) -> None:
    stale = queued(plane.store)
    act(plane.store, stale.id, None, "cancel", "me")
    plane.store.note_progress(stale, None, "waiting for 2 CPUs to become free")
    assert (plane.now(stale).state, plane.now(stale).message) == ("cancelled", "")


def test_a_job_that_exceeds_its_time_limit_is_stopped_and_fails(plane: FakeControlPlane) -> None:
    job = plane.running(time_limit_s=100.0)
    plane.offset_s += 99
    plane.step()
    assert plane.now(job).state == "running"
    plane.offset_s += 2
    plane.step(2)
    assert plane.now(job).state == "cancelling"
    assert plane.cluster.stopped == [job.id]
    report_status(plane.root, job, "cancelled", "cancelled_by_user", asked_to_stop=True)
    plane.step()
    assert (plane.now(job).state, plane.now(job).reason) == ("failed", "time_limit")


def test_a_cluster_outage_is_reported_and_loses_no_job(plane: FakeControlPlane) -> None:
    running, waiting = plane.running(), queued(plane.store)
    plane.cluster.unavailable = True
    plane.step(2)
    assert plane.now(running).state == "running"
    assert "does not respond" in plane.now(running).message
    assert plane.now(waiting).state == "queued"
    assert "does not respond" in plane.now(waiting).message
    plane.cluster.unavailable = False
    plane.step()
    report_status(plane.root, running)
    plane.step()
    assert plane.now(running).message == ""
    assert plane.now(waiting).state == "starting"


def test_a_job_is_submitted_once_after_a_crash_between_commit_and_submission(plane: FakeControlPlane) -> None:
    job = queued(plane.store)
    plane.cluster.submit = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        plane.reconciler.step()
    assert plane.now(job).state == "starting", "the desired state is committed"
    del plane.cluster.submit  # type: ignore[method-assign]
    plane.offset_s += 20
    plane.reconciler.lease.release()
    plane.reconciler = plane.replica()
    plane.step(3)
    assert plane.cluster.submitted == [job.id]
    assert plane.now(job).attempt == 1


def test_a_second_replica_reconciles_only_after_the_first_has_released_its_lease(plane: FakeControlPlane) -> None:
    first, second = plane.replica(), plane.replica()
    queued(plane.store)
    assert first.step()
    assert not second.step()
    first.lease.release()
    assert second.step()
    assert not first.step()
    assert len(plane.cluster.submitted) == 1


def test_jobs_wait_for_resources_held_by_programs_outside_the_queue(plane: FakeControlPlane) -> None:
    """If started early, the job would wait in Ray Train and fail as infeasible after scaling.start_timeout_s."""
    ours = plane.running(cpus=1.0)
    plane.cluster.total = plane.cluster.total._replace(used_cpus=3.0)  # of which 1 is ours
    behind = queued(plane.store, cpus=2.0)
    plane.step()
    message = "waiting for 2 CPUs to become free; programs outside the queue hold 2 CPUs and 0 GPUs"
    assert (plane.now(behind).state, plane.now(behind).message) == ("queued", message)
    plane.cluster.total = plane.cluster.total._replace(used_cpus=1.0)
    plane.store.note_progress(plane.now(ours), {"step": 1}, "")
    plane.step()
    assert plane.now(behind).state == "starting"


def test_jobs_with_higher_priority_start_first_and_smaller_jobs_never_overtake_them(plane: FakeControlPlane) -> None:
    low = queued(plane.store, cpus=1.0)
    high = queued(plane.store, cpus=3.0, priority=5)
    wide = queued(plane.store, cpus=2.0, priority=1)
    too_large = queued(plane.store, cpus=64.0, priority=9)
    plane.step()
    assert plane.cluster.submitted == [high.id]
    assert plane.now(wide).message == "waiting for 2 CPUs to become free"
    assert plane.now(low).state == "queued", "it would fit, but must not starve the wider one"
    assert "the cluster has 4 CPUs and 0 GPUs in total" in plane.now(too_large).message


def test_project_limits_apply_to_each_project_separately(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path, project_max_running=1, project_max_workers=3)
    first, second = queued(plane.store), queued(plane.store)
    other, large = queued(plane.store, project="b", cpus=0.5), queued(plane.store, project="c", workers=4)
    plane.step()
    assert plane.cluster.submitted == [first.id, other.id]
    assert "limit of 1 running jobs" in plane.now(second).message
    assert "project c is limited to 3" in plane.now(large).message


def test_the_number_of_running_jobs_is_limited(engine: Engine, tmp_path: Path) -> None:
    plane = FakeControlPlane(engine, tmp_path, max_running=2, autoscaling=True)
    for _ in range(5):
        queued(plane.store, cpus=100.0)
    plane.step(3)
    assert len(plane.cluster.submitted) == 2


def test_a_rejected_action_reports_the_allowed_actions(plane: FakeControlPlane) -> None:
    job = queued(plane.store)
    with pytest.raises(
        IllegalAction, match=r"cannot resume .* state is queued; allowed actions: cancel, pause"
    ) as error:
        act(plane.store, job.id, None, "resume", "me")
    assert error.value.extra["allowed_actions"] == ["cancel", "pause"]
    with pytest.raises(NotFound):
        act(plane.store, job.id, "another project", "cancel", "me")
    assert act(plane.store, job.id, None, "cancel", "me").state == "cancelled"
    assert act(plane.store, job.id, None, "cancel", "me").state == "cancelled"


@pytest.mark.parametrize("seed", range(8))
def test_every_attempt_is_started_once_and_every_job_ends_despite_random_faults(
    engine: Engine, tmp_path: Path, seed: int
) -> None:
    """Apply random actions, outcomes, outages and failovers, then let all jobs end."""
    rng = random.Random(seed)
    plane = FakeControlPlane(engine, tmp_path)
    jobs = [queued(plane.store, cpus=rng.choice([1.0, 2.0])) for _ in range(4)]
    for _ in range(60):
        event = rng.choice(
            ["step", "step", "step", "heartbeat", "end", "action", "outage", "forget", "replica", "time"]
        )
        job = plane.now(rng.choice(jobs))
        if event == "step":
            plane.reconciler.step()
        elif event == "heartbeat" and job.state in ACTIVE:
            report_status(plane.root, job)
        elif event == "end" and job.state in ACTIVE and plane.cluster.jobs.get(_submission(job)):
            state = rng.choice(["succeeded", "failed", "cancelled"])
            reasons = {"failed": [*sorted(RETRYABLE), "config_invalid"], "cancelled": ["cancelled_by_user"]}
            report_status(plane.root, job, state, rng.choice(reasons.get(state, [""])) or None)
        elif event == "action":
            action: Any = rng.choice(["cancel", "pause", "resume", "retry"])
            with contextlib.suppress(IllegalAction):
                act(plane.store, job.id, None, action, "me")
        elif event == "outage":
            plane.cluster.unavailable = not plane.cluster.unavailable
        elif event == "forget":
            plane.cluster.jobs.clear()
        elif event == "replica":
            plane.reconciler.lease.release()
            plane.reconciler = plane.replica()
        elif event == "time":
            plane.offset_s += rng.choice([1, 30, 300])
    plane.cluster.unavailable = False
    for _ in range(40):
        plane.offset_s += 400
        plane.reconciler.step()
        for job in map(plane.now, jobs):
            if job.state == "paused":
                act(plane.store, job.id, None, "resume", "me")
            elif job.state in ACTIVE and plane.cluster.jobs.get(_submission(job)):
                report_status(plane.root, job, "succeeded")
    ends = [plane.now(job).state for job in jobs]
    assert all(state in ENDED for state in ends), ends
    for job in map(plane.now, jobs):
        assert [attempt.number for attempt in plane.store.attempts(job.id)] == list(range(1, job.attempt + 1))
        assert [event.version for event in plane.store.events(job.id)] == list(range(1, job.version + 1))


def _submission(job: Job) -> str:
    return job.id if job.attempt == 1 else f"{job.id}-{job.attempt}"
