"""Tests that only one control plane at a time holds a lease, however long its work takes.

Only the database's clock determines whether a lease has expired.
"""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from service.db.leases import LEASE_S, LeaseKeeper, database_time, holders
from service.db.models import TaskLease


def test_one_of_two_control_planes_holds_a_lease_until_it_is_released(engine: Engine) -> None:
    first, second = LeaseKeeper(engine, "task"), LeaseKeeper(engine, "task")
    assert [first.acquire(), second.acquire(), first.acquire()] == [True, False, True]
    assert (first.is_held, second.is_held) == (True, False)
    assert holders(engine) == {"task": first.holder}
    first.release()
    assert holders(engine) == {}
    assert [second.acquire(), first.acquire()] == [True, False]


def test_leases_depend_only_on_the_database_clock(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = LeaseKeeper(engine, "task"), LeaseKeeper(engine, "task")
    assert first.acquire()
    monkeypatch.setattr(time, "time", lambda: 9e9)  # a control plane whose clock is decades ahead
    assert not second.acquire()
    monkeypatch.undo()
    with Session(engine) as session:
        now = session.scalar(select(database_time(engine)))
        until = session.scalar(select(TaskLease.until))
    assert now is not None
    assert until is not None
    assert abs(now - time.time()) < 60
    assert now < until <= now + LEASE_S


@pytest.mark.slow
def test_a_lease_is_renewed_during_a_long_step_unless_its_loop_has_stalled(engine: Engine) -> None:
    stalled = False
    first, second = LeaseKeeper(engine, "task", seconds=1.5), LeaseKeeper(engine, "task", seconds=1.5)
    with first.renewing(while_=lambda: not stalled):
        assert first.acquire()
        for _ in range(30):  # several lease periods
            assert not second.acquire()
            threading.Event().wait(0.1)
        stalled = True
        while not second.acquire():
            threading.Event().wait(0.05)
        assert not first.is_held
    assert holders(engine) == {"task": second.holder}, "the end of the loop must not release another's lease"


def test_a_lease_counts_as_lost_while_the_database_does_not_respond(sqlite_engine: Engine) -> None:
    now = 0.0
    keeper = LeaseKeeper(sqlite_engine, "task", clock=lambda: now)
    assert keeper.acquire()
    now = LEASE_S - 1
    assert keeper.is_held
    now = LEASE_S + 1
    assert not keeper.is_held
