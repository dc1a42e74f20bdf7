"""Tests for requests to stop trials: their files, and the driver that passes them on."""

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


def test_requests_are_stored_beside_the_ledger(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert requested_stops(folder) == set()
    request_stop(folder, 3, "a-key")
    request_stop(folder, 12, "another-key")
    assert requested_stops(folder) == {3, 12}
    assert read_actor(folder, 12) == "another-key"
    assert Ledger(folder).records == {}


def test_the_driver_passes_each_request_on_once(tmp_path: Path) -> None:
    config = ledgers.search()
    sweep = Sweep(config, build_space(config.space, config.train), str(tmp_path), "a-sweep", NullProgress())
    stopped: list[int] = []
    coordinator = SimpleNamespace(stop_trial=SimpleNamespace(remote=stopped.append))
    over = threading.Event()
    over.set()  # one listing each
    with ExitStack() as stack, StopSignals() as signals:
        driver = _SweepDriver(sweep, 100, signals, stack)
        request_stop(sweep.folder, 2, "a-key")
        driver._poll_stop_requests(coordinator, over)
        driver._poll_stop_requests(coordinator, over)
        (tmp_path / "runs/a-sweep/stop_requests/0003.json").write_text("no JSON")
        driver._poll_stop_requests(coordinator, over)
    assert stopped == [2]
    assert sweep.stop_requests == {2}
