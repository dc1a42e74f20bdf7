"""Runs handed to workers that stay: each once, in order, and again only to a worker that Ray has started anew."""

from __future__ import annotations

from amd.training.ray.coordinator import WAIT, CoordinatorActor


def test_workers_wait_take_each_run_once_and_end_when_there_are_no_more() -> None:
    coordinator = CoordinatorActor()
    assert coordinator.next_task(0) == WAIT
    coordinator.submit({"spec": "teacher"})
    assert coordinator.next_task(0) == {"spec": "teacher", "number": 1}
    assert coordinator.next_task(1) == WAIT, "the next run is not there yet"
    coordinator.finish(1, {"finished": True})
    coordinator.submit({"spec": "student"})
    assert coordinator.next_task(1) == {"spec": "student", "number": 2}
    coordinator.finish(2, {"finished": True})
    coordinator.close()
    assert coordinator.next_task(2) is None
    assert [event["kind"] for event in coordinator.drain_events()] == ["outcome", "outcome"]
    assert coordinator.drain_events() == []


def test_a_worker_started_anew_joins_the_run_that_goes_on_and_none_that_is_over() -> None:
    coordinator = CoordinatorActor()
    coordinator.submit({"spec": "one"})
    assert coordinator.next_task(0) == coordinator.next_task(0)
    coordinator.finish(1, {})
    assert coordinator.next_task(0) == WAIT


def test_a_stop_is_for_the_run_at_hand() -> None:
    coordinator = CoordinatorActor()
    coordinator.submit({"spec": "one"})
    coordinator.stop()
    assert coordinator.stop_requested()
    coordinator.submit({"spec": "two"})
    assert not coordinator.stop_requested()
