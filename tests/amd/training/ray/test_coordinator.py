"""Long-lived workers receive each run once and in order; only a restarted worker receives its run again."""

from __future__ import annotations

from amd.training.ray.coordinator import WAIT, CoordinatorActor


def test_workers_take_each_run_once_and_exit_when_the_coordinator_closes() -> None:
    coordinator = CoordinatorActor()
    assert coordinator.next_task(0) == WAIT
    coordinator.submit({"spec": "teacher"})
    assert coordinator.next_task(0) == {"spec": "teacher", "number": 1}
    assert coordinator.next_task(1) == WAIT, "the next run has not been submitted"
    coordinator.finish(1, {"finished": True})
    coordinator.submit({"spec": "student"})
    assert coordinator.next_task(1) == {"spec": "student", "number": 2}
    coordinator.finish(2, {"finished": True})
    coordinator.close()
    assert coordinator.next_task(2) is None
    assert [event["kind"] for event in coordinator.drain_events()] == ["outcome", "outcome"]
    assert coordinator.drain_events() == []


def test_a_restarted_worker_joins_an_unfinished_run_but_not_a_finished_one() -> None:
    coordinator = CoordinatorActor()
    coordinator.submit({"spec": "one"})
    assert coordinator.next_task(0) == coordinator.next_task(0)
    coordinator.finish(1, {})
    assert coordinator.next_task(0) == WAIT


def test_a_resize_stops_a_run_and_new_workers_continue_it() -> None:
    coordinator = CoordinatorActor()
    assert not coordinator.begin_resize(), "no run is in progress before the first workers start"
    coordinator.end_resize()
    coordinator.submit({"spec": "one"})
    coordinator.next_task(0)
    assert coordinator.begin_resize()
    assert coordinator.stop_requested()
    assert not coordinator.is_checkpointed()
    coordinator.finish(1, {"finished": False})
    assert coordinator.is_checkpointed()
    assert coordinator.next_task(1) == WAIT, "workers that will be replaced must not continue the run"
    coordinator.end_resize()
    assert not coordinator.stop_requested()
    assert coordinator.next_task(0) == {"spec": "one", "number": 1}
    coordinator.finish(1, {"finished": True})
    assert [event["finished"] for event in coordinator.drain_events()] == [True]


def test_a_run_that_ends_or_is_stopped_during_a_resize_is_reported() -> None:
    for stopped, finished in ((False, True), (True, False)):
        coordinator = CoordinatorActor()
        coordinator.submit({"spec": "one"})
        coordinator.next_task(0)
        coordinator.begin_resize()
        if stopped:
            coordinator.stop()
        coordinator.finish(1, {"finished": finished})
        assert len(coordinator.drain_events()) == 1


def test_a_stop_request_applies_only_to_the_current_run() -> None:
    coordinator = CoordinatorActor()
    coordinator.submit({"spec": "one"})
    coordinator.stop()
    assert coordinator.stop_requested()
    coordinator.submit({"spec": "two"})
    assert not coordinator.stop_requested()


def test_one_trial_of_a_sweep_can_be_stopped() -> None:
    coordinator = CoordinatorActor()
    coordinator.stop_trial(3)
    assert coordinator.stop_requested(3)
    assert not coordinator.stop_requested(4)
    assert not coordinator.stop_requested()
    coordinator.stop()
    assert coordinator.stop_requested(4)
