"""Leases on tasks that only one control plane may perform, such as reconciling jobs.

Times are taken from the database's clock, so control planes whose clocks differ agree on who holds a lease. A separate
thread renews the lease, so that it does not expire during a long step.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import CursorResult, Double, Engine, Float, cast, delete, extract, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from service.background import StepMonitor
from service.db.models import TaskLease

logger = logging.getLogger(__name__)

LEASE_S = 15.0
RENEWALS = 3  # per lease period, so that a renewal may fail once


class LeaseKeeper:
    """Holds the lease on one task for this process."""

    def __init__(
        self, engine: Engine, task: str, seconds: float = LEASE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.holder = uuid.uuid4().hex
        self._engine, self._task, self._seconds, self._clock = engine, task, seconds, clock
        self._held_until = float("-inf")

    @property
    def is_held(self) -> bool:
        """Whether the lease is certainly still held according to the monotonic clock. Does not use the database."""
        return self._clock() < self._held_until

    def acquire(self) -> bool:
        """Acquire or renew the lease. Returns whether this process holds it now."""
        asked_at = self._clock()  # before the request: the lease may have begun any time after it
        held = self._acquire()
        self._held_until = asked_at + self._seconds if held else float("-inf")
        return held

    def release(self) -> None:
        """Release the lease, if this process holds it."""
        self._held_until = float("-inf")
        with Session(self._engine) as session, session.begin():
            session.execute(delete(TaskLease).where(TaskLease.task == self._task, TaskLease.holder == self.holder))

    @contextmanager
    def renewing(self, while_: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Renew the acquired lease in a background thread as long as `while_` returns true, then release it.

        Database errors are logged, and the next renewal is attempted as usual.
        """
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(ended, while_), name=f"lease-{self._task}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(self._seconds)
            try:
                self.release()
            except Exception as error:
                logger.warning("the lease on the task %s could not be released: %s", self._task, error)

    def _renew(self, ended: threading.Event, while_: Callable[[], bool]) -> None:
        while not ended.wait(self._seconds / RENEWALS):
            if self._held_until == float("-inf") or not while_():
                continue
            try:
                self.acquire()
            except Exception as error:
                logger.warning("the lease on the task %s cannot be renewed; will retry: %s", self._task, error)

    def _acquire(self) -> bool:
        now = database_time(self._engine)
        lease = {"holder": self.holder, "until": now + self._seconds}
        with Session(self._engine) as session, session.begin():
            free = or_(TaskLease.holder == self.holder, TaskLease.until < now)
            result = session.execute(update(TaskLease).where(TaskLease.task == self._task, free).values(**lease))
            assert isinstance(result, CursorResult)
            if result.rowcount == 1:
                return True
        try:
            with Session(self._engine) as session, session.begin():
                if session.get(TaskLease, self._task) is not None:
                    return False
                session.execute(insert(TaskLease).values(task=self._task, **lease))
            return True
        except IntegrityError:
            return False


def run_steps(
    step: Callable[[], bool],
    stop: threading.Event,
    interval_s: float,
    lease: LeaseKeeper,
    monitor: StepMonitor,
    on_error: Callable[[Exception], None],
) -> None:
    """Call `step` at intervals until `stop` is set, renewing the lease while the steps complete.

    `step` returns whether this process holds the lease. `on_error` is called in the exception handler of a failed step,
    after which the loop continues.
    """
    with lease.renewing(while_=lambda: not monitor.is_stalled):
        while not stop.wait(interval_s):
            try:
                with monitor.step():
                    monitor.has_lease = step()
            except Exception as error:
                on_error(error)


def holders(engine: Engine) -> dict[str, str]:
    """Return the holder of each lease that has not expired, by task."""
    with Session(engine.execution_options(reads_only=True)) as session:
        rows = session.execute(select(TaskLease.task, TaskLease.holder).where(TaskLease.until >= database_time(engine)))
        return dict(rows.tuples().all())


def database_time(engine: Engine) -> ColumnElement[float]:
    """Return an expression for the database's current time, in seconds since the Unix epoch."""
    if engine.dialect.name == "postgresql":
        return cast(extract("epoch", func.clock_timestamp()), Double)
    return cast((func.julianday("now") - 2440587.5) * 86400.0, Float)
