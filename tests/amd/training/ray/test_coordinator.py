"""Runs are handed to long-lived workers once and in order; only a restarted worker receives its run again."""

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


def test_a_stop_request_applies_to_the_current_run_only() -> None:
    coordinator = CoordinatorActor()
    coordinator.submit({"spec": "one"})
    coordinator.stop()
    assert coordinator.stop_requested()
    coordinator.submit({"spec": "two"})
    assert not coordinator.stop_requested()
