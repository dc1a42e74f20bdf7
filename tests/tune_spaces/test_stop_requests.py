"""Tests for requests to stop trials: their files, the driver that passes them on, and the sweep that records them."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from amd.training.stop_signals import StopSignals
from tests.support.runs import ledgers
from tune_spaces.ledger import Ledger
from tune_spaces.search.progress import NullProgress
from tune_spaces.search.run import _SweepDriver
from tune_spaces.search.sweep import Sweep
from tune_spaces.spaces.space import build_space
from tune_spaces.stop_requests import read_actor, request_stop, requested_stops


def open_sweep(folder: Path) -> Sweep:
    config = ledgers.search()
    return Sweep(config, build_space(config.space, config.train), str(folder), "a-sweep", NullProgress())


def begin_trial(sweep: Sweep) -> int:
    record = sweep.next_trial()
    assert record is not None
    return record.number


def report_rung(sweep: Sweep, number: int, level: int) -> None:
    rung = ledgers.rung(sweep.config.fractions()[level], [40.0] * sweep.config.seeds)
    values = rung.model_dump() | {"level": level, "encoders": [], ledgers.METRIC: rung.score}
    sweep.record_result(number, values)


def test_requests_are_stored_beside_the_ledger(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert requested_stops(folder) == set()
    request_stop(folder, 3, "a-key")
    request_stop(folder, 12, "another-key")
    assert requested_stops(folder) == {3, 12}
    assert read_actor(folder, 12) == "another-key"
    assert Ledger(folder).records == {}


def test_the_driver_passes_each_request_on_once(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    stopped: list[int] = []
    coordinator = SimpleNamespace(stop_trial=SimpleNamespace(remote=stopped.append))
    over = threading.Event()
    over.set()  # each call lists the requests once
    with ExitStack() as stack, StopSignals() as signals:
        driver = _SweepDriver(sweep, 100, signals, stack)
        request_stop(sweep.folder, 2, "a-key")
        driver._poll_stop_requests(coordinator, over)
        driver._poll_stop_requests(coordinator, over)
        (tmp_path / "runs/a-sweep/stop_requests/0003.json").write_text("not JSON")
        driver._poll_stop_requests(coordinator, over)
    assert stopped == [2]
    assert sweep.stop_requests == {2}


def test_a_trial_stopped_by_a_user_keeps_its_rungs_and_the_sweep_continues(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    report_rung(sweep, begin_trial(sweep), 0)
    sweep.request_stop(0, "a-key")
    assert begin_trial(sweep) == 1
    assert sweep.records[0].state == "running"  # until its runs have saved a checkpoint
    sweep.record_end(0)
    record = open_sweep(tmp_path).records[0]
    assert (record.state, record.reason, record.message) == ("stopped", "stopped_by_user", "requested by a-key")
    assert record.score == 40.0
    sweep.request_stop(1, "a-key")
    for level in range(len(sweep.config.fractions())):
        report_rung(sweep, 1, level)
    sweep.record_end(1)
    assert sweep.records[1].state == "succeeded"  # it had reached its last rung


def test_an_interrupted_trial_stopped_by_a_user_is_not_resumed(tmp_path: Path) -> None:
    begin_trial(open_sweep(tmp_path))
    sweep = open_sweep(tmp_path)
    sweep.request_stop(0, "a-key")
    sweep.request_stop(7, "a-key")  # has not started
    assert begin_trial(sweep) == 1
    assert sweep.records[0].state == "stopped"
