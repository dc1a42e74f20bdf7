"""Runs handed to workers that stay: each once, in order, and again only to a worker that Ray has started anew."""

from __future__ import annotations

from amd.training.ray.coordinator import WAIT, Board


def test_workers_wait_take_each_run_once_and_end_when_there_are_no_more() -> None:
    board = Board()
    assert board.task_after(0) == WAIT
    board.offer({"spec": "teacher"})
    assert board.task_after(0) == {"spec": "teacher", "number": 1}
    assert board.task_after(1) == WAIT, "the next run is not there yet"
    board.finish(1, {"finished": True})
    board.offer({"spec": "student"})
    assert board.task_after(1) == {"spec": "student", "number": 2}
    board.finish(2, {"finished": True})
    board.close()
    assert board.task_after(2) is None
    assert [event["kind"] for event in board.take()] == ["outcome", "outcome"]
    assert board.take() == []


def test_a_worker_started_anew_joins_the_run_that_goes_on_and_none_that_is_over() -> None:
    board = Board()
    board.offer({"spec": "one"})
    assert board.task_after(0) == board.task_after(0)
    board.finish(1, {})
    assert board.task_after(0) == WAIT


def test_a_stop_is_for_the_run_at_hand() -> None:
    board = Board()
    board.offer({"spec": "one"})
    board.stop()
    assert board.stop_requested()
    board.offer({"spec": "two"})
    assert not board.stop_requested()
