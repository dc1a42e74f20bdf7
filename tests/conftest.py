"""Fixtures for all tests: the golden folder and an S3 server per session. For Ray, see tests/support/ray_cluster.py."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.ray_cluster import ray_cluster  # noqa: F401  a fixture
from tests.support.s3 import S3Server

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["AMD_CONFIG"] = os.devnull  # without the services that the user is logged in to

# Disable deadlines: the first example of a test may import modules, which is slow on a busy machine.
hypothesis.settings.register_profile("amd", deadline=None)
hypothesis.settings.load_profile("amd")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Group tests by file for the two processes of `make test`.

    All tests that need Ray form one group, which starts first because it takes as long as all others together.
    """
    for item in items:
        ray = "flows" in item.path.parts or "ray_cluster" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if ray else item.path.stem))
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != ("ray",))


@pytest.fixture(scope="module", autouse=True)
def _ordinary_scheduling() -> Iterator[None]:
    """Fail if a test leaves this process in a real-time scheduling class, which would starve Ray."""
    yield
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER, "a test of this file changed the scheduling class"


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Start an S3 server (moto) on loopback and point the environment to it. Returns its URL."""
    server = S3Server()
    saved = dict(os.environ)
    os.environ.update(
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL_S3=server.url,
        AWS_EC2_METADATA_DISABLED="true",
    )
    yield server.url
    server.stop()
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def s3_root(s3_endpoint: str) -> str:
    """Create a bucket and return its URL."""
    import boto3

    bucket = f"amd-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"
