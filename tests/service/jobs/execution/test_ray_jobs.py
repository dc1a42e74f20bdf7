"""Tests for submitting a driver to Ray, without a Ray cluster."""

from __future__ import annotations

from typing import Any

import pytest

from amd.storage import STORAGE_CREDENTIALS, CredentialError, filesystem
from amd.training.ray.cluster import FORWARDED
from service.jobs.execution.protocol import DRIVER_POLICY, DriverPolicy
from service.jobs.execution.ray_jobs import RayJobs, used_resources
from service.projects.schemas import StorageCredential


class RecordedSubmissions:
    """A fake Ray Jobs client that records submissions."""

    def __init__(self) -> None:
        self.submissions: list[dict[str, Any]] = []

    def submit_job(self, **arguments: Any) -> None:
        self.submissions.append(arguments)


def test_a_drivers_policy_is_passed_in_its_environment_rather_than_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, client = RayJobs("http://127.0.0.1:1", None, "python"), RecordedSubmissions()
    monkeypatch.setattr(cluster, "_client", lambda: client)
    policy = DriverPolicy(digest="0" * 64, allowed_uris=("s3://bucket/sets", "/data"))
    cluster.submit("job-2", "job", 2, "s3://bucket/root", 60.0, policy)
    (submission,) = client.submissions
    assert submission["entrypoint"] == "python -m service.jobs.runner job 2 s3://bucket/root"  # older nodes accept it
    environment = submission["runtime_env"]["env_vars"]
    assert DriverPolicy.model_validate_json(environment[DRIVER_POLICY]) == policy
    assert STORAGE_CREDENTIALS not in environment


def test_storage_credentials_reach_all_processes_of_a_job_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, client = RayJobs("http://127.0.0.1:1", None, "python"), RecordedSubmissions()
    monkeypatch.setattr(cluster, "_client", lambda: client)
    credential = StorageCredential(prefixes=["s3://bucket/sets"], secret="file:/secrets/sets")
    policy = DriverPolicy(digest="0" * 64, allowed_uris=(), credentials={"sets": credential})
    cluster.submit("job", "job", 1, "/root", 60.0, policy)
    environment = client.submissions[0]["runtime_env"]["env_vars"]
    monkeypatch.setenv(STORAGE_CREDENTIALS, environment[STORAGE_CREDENTIALS])
    with pytest.raises(CredentialError, match="storage credential sets: file:/secrets/sets"):
        filesystem("s3://bucket/sets/a")
    assert STORAGE_CREDENTIALS in FORWARDED, "Ray Train's workers receive only these variables of their driver"


@pytest.mark.parametrize(
    ("status", "used"),
    [
        (None, {}),
        ({}, {}),
        ({"loadMetricsReport": None}, {}),
        ({"loadMetricsReport": {"usage": None}}, {}),
        ({"loadMetricsReport": {"usage": {"CPU": [2.0, 4.0], "GPU": [1.0, 8.0]}}}, {"CPU": 2.0, "GPU": 1.0}),
    ],
)
def test_a_cluster_that_reports_no_usage_counts_as_unused(
    status: dict[str, Any] | None, used: dict[str, float]
) -> None:
    assert used_resources(status) == used
