from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from amd.artifacts.discovery import encoder_folder
from service.db.models import Job
from service.jobs.execution.protocol import RETRYABLE, JobFolder
from service.jobs.execution.ray_jobs import Seen
from service.jobs.execution.reconciler import Reconciler, act
from service.jobs.schemas import ACTIVE, ENDED
from service.jobs.store import JobStore
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from service.settings import Settings
from service.web.errors import IllegalAction, NotFound
from tests.support.service.encoder_cards import publish
from tests.support.service.fake_cluster import FakeCluster, queued, says


class World:
    """A store, a cluster, and a clock that a test turns."""

    def __init__(self, engine: Engine, root: Path, **settings: Any) -> None:
        self.store, self.cluster, self.root, self.later = JobStore(engine), FakeCluster(), str(root), 0.0
        self.settings = Settings(storage=self.root, data_dir=root, **settings)
        self.reconciler = self.replica()

    def replica(self) -> Reconciler:
        return Reconciler(self.store, self.cluster, self.settings, lambda: time.time() + self.later)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.reconciler.step()

    def now(self, job: Job) -> Job:
        return self.store.get(job.id)

    def running(self, **fields: Any) -> Job:
        job = queued(self.store, **fields)
        self.step()
        says(self.root, self.now(job))
        self.step()
        assert self.now(job).state == "running"
        return self.now(job)


@pytest.fixture
def world(engine: Engine, tmp_path: Path) -> World:
    return World(engine, tmp_path)


def test_a_job_is_queued_started_run_and_ended_and_every_step_is_an_event(world: World) -> None:
    job = world.running()
    assert job.progress == {"step": 3, "steps": 10}
    says(world.root, job, "succeeded", result={"encoder_folder": "x/encoders/e"})
    world.step()
    done = world.now(job)
    assert (done.state, done.attempt, done.result) == ("succeeded", 1, {"encoder_folder": "x/encoders/e"})
    assert done.ended_at is not None
    assert [event.type for event in world.store.events(job.id)] == ["created", "starting", "running", "succeeded"]
    assert [event.version for event in world.store.events(job.id)] == [1, 2, 3, 4]
    assert world.cluster.submitted == [job.id]
    assert [(attempt.number, attempt.state) for attempt in world.store.attempts(job.id)] == [(1, "succeeded")]


def test_what_a_job_has_published_is_known_once_the_job_has_succeeded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = world.running()
    publish(world.root, job.id)
    monkeypatch.setattr(EncoderDiscovery, "look", lambda self: None)  # nor do looks at all of them come in between
    says(world.root, job, "succeeded", result={"encoder_folder": encoder_folder(world.root, job.id)})
    world.step()
    assert world.now(job).state == "succeeded"
    assert EncoderStore(world.store.engine).get(job.id).job_id == job.id


def test_what_the_run_wrote_outranks_what_a_restarted_head_believes(world: World) -> None:
    job = world.running()
    world.cluster.jobs[job.id] = world.cluster.jobs[job.id]._replace(status="FAILED", message="head restarted")
    world.step()
    assert world.now(job).state == "running", "its word may still come"
    says(world.root, job, "succeeded")
    world.step()
    assert world.now(job).state == "succeeded"


def test_a_run_that_gives_signs_of_life_lives_whatever_ray_says(world: World) -> None:
    job = world.running()
    world.cluster.jobs.clear()
    for _ in range(5):
        world.later += 50
        says(world.root, job)
        world.step()
        assert world.now(job).state == "running"
    for _ in range(2):
        world.later += 50
        world.step()
    assert (world.now(job).state, world.now(job).reason) == ("retrying", "node_lost")


def test_a_failure_of_machines_is_tried_again_with_growing_pauses_and_a_users_mistake_is_not(world: World) -> None:
    job = world.running()
    says(world.root, job, "failed", "node_lost", message="gone")
    world.step()
    assert world.now(job).state == "retrying"
    world.step()
    assert world.now(job).attempt == 1, "not at once"
    world.later += 6
    world.step()
    job = world.now(job)
    assert (job.state, job.attempt) == ("starting", 2)
    assert world.cluster.submitted[-1] == f"{job.id}-2"
    says(world.root, job, "failed", "node_lost")
    world.step()
    world.later += 6
    world.step()
    assert world.now(job).attempt == 2, "the second pause is longer"
    world.later += 6
    world.step()
    job = world.now(job)
    assert job.attempt == 3
    says(world.root, job, "failed", "storage_unreachable", message="away")
    world.step()
    assert (world.now(job).state, world.now(job).reason) == ("failed", "storage_unreachable"), "max_retries=2"

    other = world.running()
    says(world.root, other, "failed", "config_invalid", message="bad")
    world.step()
    assert (world.now(other).state, world.now(other).message) == ("failed", "bad")
    again = act(world.store, other.id, None, "retry", "me")
    assert (again.state, again.retries, again.reason) == ("queued", 0, None)
    world.step()
    assert world.now(other).attempt == 2


@pytest.mark.parametrize(("action", "ends"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_stop_is_asked_of_ray_again_until_it_has_ended_and_frees_the_room(
    world: World, action: Any, ends: str
) -> None:
    job = world.running(cpus=4.0)
    behind = queued(world.store, cpus=4.0)
    world.step()
    assert world.now(behind).message == "waits for 4 CPUs to be free"
    asked = act(world.store, job.id, None, action, "me")
    assert asked.state in ("cancelling", "pausing")
    assert act(world.store, job.id, None, action, "me").version == asked.version, "asking twice changes nothing"
    world.step(2)
    assert world.cluster.stopped == [job.id]
    world.later += 11
    world.step()
    assert world.cluster.stopped == [job.id, job.id]
    says(world.root, job, "cancelled", "cancelled_by_user", message="stopped after step 3", asked_to_stop=True)
    world.step()
    assert world.now(job).state == ends
    assert world.now(behind).state == "starting"


def test_an_attempt_is_told_how_long_it_may_take_to_stop(world: World) -> None:
    """As the request says, else what the config allows its workers and some time for them to report back."""
    for deadline_s, seconds in ((5.0, 5.0), (None, 60.0)):
        job = world.running()
        act(world.store, job.id, None, "cancel", "me", deadline_s)
        world.step()
        limit = JobFolder(world.root, job.id).stop_limit(1)
        assert limit is not None
        assert seconds - 2 < limit <= seconds


def test_a_driver_that_cannot_start_is_told_by_its_last_line(world: World) -> None:
    job = queued(world.store)
    world.step()
    trace = "Traceback (most recent call last):\n  …\nModuleNotFoundError: No module named 'service'\n"
    world.cluster.jobs[job.id] = Seen("FAILED", trace)
    world.step()
    world.later += 30
    world.step()
    assert world.now(job).state == "retrying"
    expected = "its driver could not start: ModuleNotFoundError: No module named 'service'"
    assert expected in world.now(job).message


def test_a_paused_job_goes_on_where_it_was(world: World) -> None:
    job = world.running()
    act(world.store, job.id, None, "pause", "me")
    says(world.root, job, "cancelled", "cancelled_by_user", asked_to_stop=True)
    world.step()
    act(world.store, job.id, None, "resume", "me")
    world.step()
    assert (world.now(job).state, world.now(job).attempt) == ("starting", 2)


def test_a_job_that_ended_while_it_was_cancelled_has_succeeded(world: World) -> None:
    job = world.running()
    act(world.store, job.id, None, "cancel", "me")
    says(world.root, job, "succeeded")
    world.step()
    assert world.now(job).state == "succeeded"


def test_a_driver_that_went_away_with_its_node_is_queued_again_and_one_stopped_through_ray_is_not(world: World) -> None:
    job = world.running()
    says(world.root, job, "cancelled", "cancelled_by_user", asked_to_stop=True)
    world.step()
    assert (world.now(job).state, world.now(job).retries) == ("queued", 0)
    other = world.running()
    world.cluster.jobs[other.id] = world.cluster.jobs[other.id]._replace(status="STOPPED")
    says(world.root, other, "cancelled", "cancelled_by_user", asked_to_stop=True)
    world.step()
    assert world.now(other).state == "cancelled"


def test_what_a_look_still_has_to_say_of_a_job_that_has_moved_on_is_dropped(world: World) -> None:
    seen = queued(world.store)
    act(world.store, seen.id, None, "cancel", "me")
    world.store.note_progress(seen, None, "waits for 2 CPUs to be free")
    assert (world.now(seen).state, world.now(seen).message) == ("cancelled", "")


def test_a_time_limit_ends_with_a_checkpoint_and_a_failure(world: World) -> None:
    job = world.running(time_limit_s=100.0)
    world.later += 99
    world.step()
    assert world.now(job).state == "running"
    world.later += 2
    world.step(2)
    assert world.now(job).state == "cancelling"
    assert world.cluster.stopped == [job.id]
    says(world.root, job, "cancelled", "cancelled_by_user", asked_to_stop=True)
    world.step()
    assert (world.now(job).state, world.now(job).reason) == ("failed", "time_limit")


def test_a_cluster_that_is_away_is_told_and_loses_nothing(world: World) -> None:
    running, waiting = world.running(), queued(world.store)
    world.cluster.away = True
    world.step(2)
    assert world.now(running).state == "running"
    assert "does not answer" in world.now(running).message
    assert world.now(waiting).state == "queued"
    assert "does not answer" in world.now(waiting).message
    world.cluster.away = False
    world.step()
    says(world.root, running)
    world.step()
    assert world.now(running).message == ""
    assert world.now(waiting).state == "starting"


def test_a_control_plane_that_died_before_it_asked_ray_asks_once_when_it_is_back(world: World) -> None:
    job = queued(world.store)
    world.cluster.submit = lambda *words: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        world.reconciler.step()
    assert world.now(job).state == "starting", "the intent is committed"
    del world.cluster.submit  # type: ignore[method-assign]
    world.later += 20
    world.store.let_go("reconciler", world.reconciler.holder)
    world.reconciler = world.replica()
    world.step(3)
    assert world.cluster.submitted == [job.id]
    assert world.now(job).attempt == 1


def test_of_two_replicas_one_moves_the_jobs_and_the_other_takes_over(world: World) -> None:
    first, second = world.replica(), world.replica()
    queued(world.store)
    assert first.step()
    assert not second.step()
    world.store.let_go("reconciler", first.holder)
    assert second.step()
    assert not first.step()
    assert len(world.cluster.submitted) == 1


def test_higher_priority_starts_first_and_what_fits_never_overtakes_it(world: World) -> None:
    low = queued(world.store, cpus=1.0)
    high = queued(world.store, cpus=3.0, priority=5)
    wide = queued(world.store, cpus=2.0, priority=1)
    never = queued(world.store, cpus=64.0, priority=9)
    world.step()
    assert world.cluster.submitted == [high.id]
    assert world.now(wide).message == "waits for 2 CPUs to be free"
    assert world.now(low).state == "queued", "it would fit, but must not keep the wider one waiting for ever"
    assert "the cluster has 4 CPUs and 0 GPUs in all" in world.now(never).message


def test_a_projects_limits_hold_its_jobs_back_and_nobody_elses(engine: Engine, tmp_path: Path) -> None:
    world = World(engine, tmp_path, project_max_running=1, project_max_workers=3)
    first, second = queued(world.store), queued(world.store)
    other, crowd = queued(world.store, project="b", cpus=0.5), queued(world.store, project="c", workers=4)
    world.step()
    assert world.cluster.submitted == [first.id, other.id]
    assert "which is its limit" in world.now(second).message
    assert "project c may have 3 workers" in world.now(crowd).message


def test_no_more_jobs_run_at_once_than_allowed(engine: Engine, tmp_path: Path) -> None:
    world = World(engine, tmp_path, max_running=2, autoscaling=True)
    for _ in range(5):
        queued(world.store, cpus=100.0)
    world.step(3)
    assert len(world.cluster.submitted) == 2


def test_what_a_state_does_not_allow_is_refused_with_what_it_does(world: World) -> None:
    job = queued(world.store)
    with pytest.raises(IllegalAction, match=r"resume: .* is queued; it allows cancel, pause") as refused:
        act(world.store, job.id, None, "resume", "me")
    assert refused.value.extra["allowed_actions"] == ["cancel", "pause"]
    with pytest.raises(NotFound):
        act(world.store, job.id, "another project", "cancel", "me")
    assert act(world.store, job.id, None, "cancel", "me").state == "cancelled"
    assert act(world.store, job.id, None, "cancel", "me").state == "cancelled"


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_no_attempt_runs_twice_and_every_job_ends(engine: Engine, tmp_path: Path, seed: int) -> None:
    """Random actions, outcomes, outages and replicas; then calm: every job comes to an end, each attempt begun once."""
    chance = random.Random(seed)
    world = World(engine, tmp_path)
    jobs = [queued(world.store, cpus=chance.choice([1.0, 2.0])) for _ in range(4)]
    for _ in range(60):
        deed = chance.choice(["step", "step", "step", "word", "end", "ask", "away", "forget", "replica", "time"])
        job = world.now(chance.choice(jobs))
        if deed == "step":
            world.reconciler.step()
        elif deed == "word" and job.state in ACTIVE:
            says(world.root, job)
        elif deed == "end" and job.state in ACTIVE and world.cluster.jobs.get(_submission(job)):
            state = chance.choice(["succeeded", "failed", "cancelled"])
            reasons = {"failed": [*sorted(RETRYABLE), "config_invalid"], "cancelled": ["cancelled_by_user"]}
            says(world.root, job, state, chance.choice(reasons.get(state, [""])) or None)
        elif deed == "ask":
            asked: Any = chance.choice(["cancel", "pause", "resume", "retry"])
            with contextlib.suppress(IllegalAction):
                act(world.store, job.id, None, asked, "me")
        elif deed == "away":
            world.cluster.away = not world.cluster.away
        elif deed == "forget":
            world.cluster.jobs.clear()
        elif deed == "replica":
            world.store.let_go("reconciler", world.reconciler.holder)
            world.reconciler = world.replica()
        elif deed == "time":
            world.later += chance.choice([1, 30, 300])
    world.cluster.away = False
    for _ in range(40):
        world.later += 400
        world.reconciler.step()
        for job in map(world.now, jobs):
            if job.state == "paused":
                act(world.store, job.id, None, "resume", "me")
            elif job.state in ACTIVE and world.cluster.jobs.get(_submission(job)):
                says(world.root, job, "succeeded")
    ends = [world.now(job).state for job in jobs]
    assert all(state in ENDED for state in ends), ends
    for job in map(world.now, jobs):
        assert [attempt.number for attempt in world.store.attempts(job.id)] == list(range(1, job.attempt + 1))
        assert [event.version for event in world.store.events(job.id)] == list(range(1, job.version + 1))


def _submission(job: Job) -> str:
    return job.id if job.attempt == 1 else f"{job.id}-{job.attempt}"
