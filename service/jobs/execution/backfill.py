"""Backfill: start jobs behind a blocked job without delaying it.

The blocked job gets a reservation: the time by which enough running jobs will have ended, given their time limits.
A job behind it may start if it ends before that time, or if it needs only resources that the blocked job leaves free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from service.db.models import Job
from service.jobs.actions import CHECKPOINT_DEADLINE_S, STOP_GRACE_S

STOP_S = CHECKPOINT_DEADLINE_S + STOP_GRACE_S  # from the time limit until the resources are free
UNKNOWN = math.inf
ROUNDING = 1e-9  # tolerance for sums of fractional CPUs


class Usage(NamedTuple):
    """Resources held on the cluster."""

    cpus: float = 0.0
    gpus: float = 0.0

    def plus(self, other: Usage) -> Usage:
        return Usage(self.cpus + other.cpus, self.gpus + other.gpus)

    def minus(self, other: Usage) -> Usage:
        return Usage(self.cpus - other.cpus, self.gpus - other.gpus)

    def fits(self, free: Usage) -> bool:
        """Whether enough of every needed resource is free. Resources that are not needed are ignored."""
        return all(need <= left + ROUNDING for need, left in zip(self, free, strict=True) if need)


class Holder(NamedTuple):
    """Resources that are held until a certain time, or until an UNKNOWN time."""

    held: Usage
    until: float


class Reservation(NamedTuple):
    """Start of a blocked job, and resources that jobs behind it may hold beyond that time."""

    start: float
    """Latest time at which the job can start; UNKNOWN if jobs without a time limit hold the resources it needs."""
    spare: Usage

    def allows(self, needed: Usage, end: float) -> bool:
        """Whether a job that holds resources until `end` does not delay the start."""
        return end <= self.start < UNKNOWN or needed.fits(self.spare)

    def after(self, needed: Usage, end: float) -> Reservation:
        """Return the reservation as it is once such a job has started."""
        return self if end <= self.start < UNKNOWN else self._replace(spare=self.spare.minus(needed))


def reserve(needed: Usage, total: Usage, holders: Iterable[Holder]) -> Reservation:
    """Return the reservation of a job that does not fit the free resources.

    If its start is unknown, everything held now counts as held at its start: any of it may be released last.
    """
    holders = list(holders)
    free = total
    for holder in holders:
        free = free.minus(holder.held)
    everything_held = free.minus(needed)
    for holder in sorted(holders, key=lambda holder: holder.until):
        if holder.until == UNKNOWN:
            break
        free = free.plus(holder.held)
        if needed.fits(free):
            return Reservation(holder.until, free.minus(needed))
    return Reservation(UNKNOWN, everything_held)


def expected_end(job: Job, now: float) -> float:
    """Return the latest end of an active job, or of a waiting job if it starts now. UNKNOWN without a time limit."""
    if job.stop_by is not None:
        return max(now, job.stop_by)
    if job.time_limit_s is None:
        return UNKNOWN
    is_active = job.state not in ("queued", "retrying")
    start = job.started_at if is_active and job.started_at is not None else now
    return max(now, start + job.time_limit_s + STOP_S)
