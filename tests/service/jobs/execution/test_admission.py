"""Tests for estimating the resources held outside the queue while Ray's report lags behind the jobs' states."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.jobs.execution.admission import RELEASE_S, START_S, ExternalUsage
from service.jobs.execution.backfill import Usage
from service.jobs.execution.ray_jobs import Capacity
from tests.support.service.fake_cluster import new_job


class SimulatedClock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def capacity(used: float) -> Capacity:
    return Capacity(64.0, 0.0, 1e9, used)


def test_resources_of_a_job_that_has_just_ended_are_not_counted_as_external() -> None:
    clock = SimulatedClock()
    external = ExternalUsage(clock)
    assert external.update(capacity(6.0), Usage(4.0), []) == Usage(2.0)
    clock.now += RELEASE_S / 2
    assert external.update(capacity(6.0), Usage(0.0), []) == Usage(2.0), "Ray still reports the ended job"
    clock.now += RELEASE_S
    assert external.update(capacity(2.0), Usage(0.0), []) == Usage(2.0)


def test_a_starting_job_does_not_hide_external_usage() -> None:
    clock = SimulatedClock()
    external = ExternalUsage(clock)
    external.update(capacity(3.0), Usage(), [])
    starting = new_job(progress=None, started_at=clock.now)
    assert external.update(capacity(3.0), Usage(4.0), [starting]) == Usage(3.0), "it holds nothing yet"
    clock.now += START_S + RELEASE_S
    assert external.update(capacity(5.0), Usage(4.0), [starting]) == Usage(1.0), "its time to start is over"


@given(st.lists(st.tuples(st.floats(0, 8), st.floats(0, 8)), min_size=1, max_size=8))
def test_external_usage_is_exact_once_jobs_hold_what_they_reserve(usages: list[tuple[float, float]]) -> None:
    clock = SimulatedClock()
    external = ExternalUsage(clock)
    for ours, others in usages:
        clock.now += RELEASE_S + 1
        found = external.update(capacity(ours + others), Usage(ours), [new_job(progress={"step": 1})])
        assert abs(found.cpus - others) < 1e-9
