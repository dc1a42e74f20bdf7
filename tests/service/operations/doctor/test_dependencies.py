"""Tests for the doctor's checks of the database, the clock, the storage root and Ray, in good and bad states."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine, text

from service.db.engine import open_engine
from service.operations.doctor.dependencies import check_clock, check_database, check_ray, check_storage
from tests.support.service.fake_cluster import FakeCluster


def ticking(seconds: float) -> Callable[[], float]:
    """Return a clock that advances by `seconds` with each reading."""
    return itertools.count(0.0, seconds).__next__


def test_the_database_check_measures_the_response_time_and_compares_the_schema(sqlite_engine: Engine) -> None:
    assert check_database(sqlite_engine, ticking(0.01)).message == "sqlite responds in 10 ms"
    assert check_database(sqlite_engine, ticking(3.0)).severity == "warning"
    with sqlite_engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    assert "migrate" in check_database(sqlite_engine).remedy


def test_a_database_that_does_not_respond_is_an_error() -> None:
    found = check_database(open_engine("postgresql+psycopg://nobody@127.0.0.1:1/none"))
    assert (found.severity, "AMD_DATABASE_URL" in found.remedy) == ("error", True)


def test_the_clock_check_compares_this_machine_with_the_database(engine: Engine) -> None:
    assert check_clock(engine).severity == "ok"
    assert check_clock(engine, lambda: time.time() + 30).severity == "warning"
    behind = check_clock(engine, lambda: time.time() - 90)
    assert (behind.severity, behind.remedy) == ("error", "synchronise both clocks with NTP")


def test_the_storage_check_writes_a_file_and_leaves_none(tmp_path: Path) -> None:
    assert check_storage(str(tmp_path), ticking(0.01)).severity == "ok"
    assert list(tmp_path.iterdir()) == []
    assert check_storage(str(tmp_path), ticking(5.0)).severity == "warning"
    (tmp_path / "file").touch()
    assert "cannot be written" in check_storage(str(tmp_path / "file")).message


def test_the_ray_check_reports_resources_and_their_absence() -> None:
    message = check_ray(FakeCluster(cpus=1), autoscaling=False).message
    assert message.startswith("Ray offers 1 CPU and 0 GPUs, of which programs have reserved 0 CPUs and 0 GPUs")
    assert "--num-cpus" in message  # Ray's number may differ from the machine's
    assert check_ray(FakeCluster(cpus=0), autoscaling=False).severity == "error"
    assert check_ray(FakeCluster(cpus=0), autoscaling=True).severity == "ok"
    cluster = FakeCluster()
    cluster.unavailable = True
    assert "amd up" in check_ray(cluster, autoscaling=True).remedy
