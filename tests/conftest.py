"""Fixtures for all tests: the golden folder and an S3 server per session. For Ray, see tests/support/ray_cluster.py."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.ray_cluster import ray_cluster  # noqa: F401  a fixture
from tests.support.s3 import S3Server

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["AMD_CONFIG"] = os.devnull  # ignore the services that the user is logged in to

gc.disable()  # until all tests are collected, because imports create objects but hardly any garbage

# Disable deadlines: the first example of a test may import modules, which is slow on a busy machine.
hypothesis.settings.register_profile("amd", deadline=None)
hypothesis.settings.load_profile("amd")


# Fixtures that start a server process, and the marker that their tests receive.
MARKERS = {"ray_cluster": "ray", "s3_endpoint": "server", "postgresql": "server"}

TESTS = Path(__file__).parent
collect_ignore = [] if "AMD_AXE" in os.environ else ["browser"]  # needs what only `make test-browser` installs
# Test files that `make test-fast` leaves out: they start processes that import torch, or train for many seconds.
# `make test` starts them in this order. The first ones fork ranks, so that the fork server of each pytest process
# preloads the modules that ranks import (tests/support/processes.py) rather than those that loader processes import.
SLOW_FILES = tuple(
    TESTS / name
    for name in (
        "amd/training/runs/test_torch_ranks.py",
        "amd/downstream/supervised/test_worker.py",
        "amd/training/trainer/test_pretraining.py",
        "amd/downstream/supervised/classification/test_evaluation.py",
        "service/web/test_openapi.py",
        "service/test_control_planes.py",
        "amd/demo/test_run.py",
        "amd/downstream/embedding/test_bulk.py",
        "amd/training/runs/test_launch.py",
        "amd/training/runs/test_teacher_presets.py",
        "amd/exchange/test_export.py",
        "service/jobs/execution/test_driver.py",
        "amd/downstream/supervised/classification/test_run.py",
        "amd/training/reporting/test_prober.py",
        "test_store_0_1.py",
        "amd/training/test_main.py",
        "test_public_surface.py",
        "amd/downstream/supervised/detection/test_run.py",
        "test_minimal_install.py",
        "service/cli/test_demo.py",
        "amd/training/test_stall_watchdog.py",
        "service/auth/test_authorization.py",
        "amd/data/decoding/test_isolation.py",
        "service/operations/retention/test_collection.py",
        "amd/data/dataset/test_demo.py",
        "tune_spaces/search/test_population.py",
        "tune_spaces/report/test_report.py",
        "amd/storage/test_credentials.py",
        "service/db/test_models.py",
        "amd/training/trainer/test_loop.py",
        "service/cli/test_encoder_source.py",
        "amd/data/loading/test_loader_files.py",
        "service/inference/test_hostile_files.py",
        "service/cli/test_doctor.py",
        "service/test_drain.py",
        "service/test_outages.py",
        "service/cli/test_jobs.py",
        "service/jobs/test_location_checks.py",
        "service/console/test_oidc_sign_in.py",
        "tune_spaces/search/test_sampler.py",
    )
)


FOLDER_NODES = pytest.StashKey[dict[Path, pytest.Collector]]()


@pytest.hookimpl(wrapper=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> Generator[None, Any, Any]:
    """Return the same node each time a folder is collected.

    A test file named on the command line makes pytest collect its folder again. pytest 9.1 attaches the fixtures of a
    conftest.py to its folder's node, so tests below a second node for that folder would not find them:
    https://github.com/pytest-dev/pytest/issues/14635, fixed after 9.1.1.
    """
    node = yield
    return node and parent.stash.setdefault(FOLDER_NODES, {}).setdefault(path, node)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures that they use, and group them by file for the parallel processes of `make test`.

    Slow files start first, in the order of SLOW_FILES, so both processes finish at about the same time. All tests that
    need Ray form one group.
    """
    for item in items:
        for name in _markers(item):
            item.add_marker(name)
        ray = item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("ray" if ray else item.nodeid.partition("::")[0]))
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        order = {path: number for number, path in enumerate(SLOW_FILES)}
        items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage from now on, but exempt the objects that imports and test collection created."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise Triton reports its objects as leaked when Python exits


def _markers(item: pytest.Item) -> set[str]:
    """Return the markers implied by a test's file, its fixtures and its kind of database."""
    used = {*getattr(item, "fixturenames", ())}
    if hasattr(item, "callspec"):
        used.add(item.callspec.params.get("database_url"))  # it requests the `postgresql` fixture only at run time
    found = {marker for fixture, marker in MARKERS.items() if fixture in used}
    if "flows" in item.path.parts:
        found.add("ray")
    if item.path in SLOW_FILES:
        found.add("slow")
    return found


@pytest.fixture(scope="module", autouse=True)
def _ordinary_scheduling() -> Iterator[None]:
    """Fail if a test leaves this process in a real-time scheduling class, which would starve Ray."""
    yield
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER, "a test in this file changed the scheduling class"


@pytest.fixture(scope="session")
def golden() -> Path:
    return TESTS / "golden"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Start an S3 server (moto) on loopback and point the environment variables at it. Returns its URL."""
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
