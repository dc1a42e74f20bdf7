"""Cluster client for the reconciler: submit, poll and stop Ray jobs, and read the cluster's capacity.

The only module in the jobs package that calls Ray. Ray's client reports errors as text and has no timeouts; the methods
here return a value or None, or raise ClusterUnavailable. Ray is imported on first use, so the control plane can
start without a cluster.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

from service.jobs.execution.protocol import DriverPolicy
from service.jobs.execution.ray_nodes import Node, parse_bytes, parse_nodes
from service.web.errors import ClusterNotResponding, ClusterUnavailable

logger = logging.getLogger(__name__)

TIMEOUT_S = 15.0
KILL_GRACE_S = 60.0  # time after a job's own deadline before Ray kills a driver that has not stopped
NODES = "/api/v0/nodes?detail=1&limit=10000"
LIVE_ACTORS = "/api/v0/actors?limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"

RayStatus = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]


class RayJobStatus(NamedTuple):
    """Status of a submission, as reported by Ray."""

    status: RayStatus
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Capacity(NamedTuple):
    """Total resources of all live nodes."""

    cpus: float
    gpus: float
    memory: float
    """Memory of the largest node, in bytes."""
    used_cpus: float = 0.0
    """CPUs in use by any program on the cluster; updated by Ray every few seconds."""
    used_gpus: float = 0.0


class Cluster(Protocol):
    """Interface to a cluster that runs jobs. Every method may raise ClusterUnavailable."""

    def submit(
        self, submission_id: str, job_id: str, attempt: int, root: str, deadline_s: float, policy: DriverPolicy
    ) -> None:
        """Start an attempt's driver. No-op if this submission ID already exists."""

    def status(self, submission_id: str) -> RayJobStatus | None:
        """Return the status of a submission, or None if Ray does not know it."""

    def stop(self, submission_id: str) -> None:
        """Ask a submission to stop. No-op if it does not exist."""

    def logs(self, submission_id: str) -> str | None:
        """Return the output of a submission's driver so far, or None if Ray does not know it."""

    def capacity(self) -> Capacity: ...

    def nodes(self, submission_ids: Collection[str]) -> list[Node]:
        """Return the nodes, with those of these submissions that have a process on them."""


class OnceSilentCluster:
    """Cluster wrapper that fails fast: once a call goes unanswered, every call fails immediately until `reset`.

    The reconciler calls the cluster for each job, so a Ray head that accepts connections but does not answer costs one
    timeout per step instead of one per job.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._silence: ClusterNotResponding | None = None

    def reset(self) -> None:
        self._silence = None

    def submit(
        self, submission_id: str, job_id: str, attempt: int, root: str, deadline_s: float, policy: DriverPolicy
    ) -> None:
        with self._remembered_silence():
            self._cluster.submit(submission_id, job_id, attempt, root, deadline_s, policy)

    def status(self, submission_id: str) -> RayJobStatus | None:
        with self._remembered_silence():
            return self._cluster.status(submission_id)

    def stop(self, submission_id: str) -> None:
        with self._remembered_silence():
            self._cluster.stop(submission_id)

    def logs(self, submission_id: str) -> str | None:
        with self._remembered_silence():
            return self._cluster.logs(submission_id)

    def capacity(self) -> Capacity:
        with self._remembered_silence():
            return self._cluster.capacity()

    def nodes(self, submission_ids: Collection[str]) -> list[Node]:
        with self._remembered_silence():
            return self._cluster.nodes(submission_ids)

    @contextmanager
    def _remembered_silence(self) -> Iterator[None]:
        if self._silence is not None:
            raise self._silence
        try:
            yield
        except ClusterNotResponding as error:
            self._silence = error
            raise


class RayJobs:
    """Cluster backed by the Ray Jobs API."""

    def __init__(self, dashboard: str, token_file: Path | None, python: str) -> None:
        self._dashboard, self._token_file, self._python = dashboard.rstrip("/"), token_file, python
        self._job_client: Any = None
        self._ray_jobs: dict[str, str] = {}  # Ray job IDs by submission ID

    def submit(
        self, submission_id: str, job_id: str, attempt: int, root: str, deadline_s: float, policy: DriverPolicy
    ) -> None:
        entrypoint = shlex.join([self._python, "-m", "service.jobs.runner", job_id, str(attempt), root])
        environment = {
            "RAY_JOB_STOP_WAIT_TIME_S": f"{deadline_s + KILL_GRACE_S:g}",
            "AMD_JOB": job_id,
            **policy.environment(),
        }
        with self._translated_errors():
            try:
                self._client().submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env={"env_vars": environment},
                    metadata={"amd_job": job_id, "amd_attempt": str(attempt)},
                )
            except RuntimeError as error:  # Ray returns status 500 with a traceback if the ID already exists
                if "already exists" not in str(error):
                    raise

    def status(self, submission_id: str) -> RayJobStatus | None:
        with self._translated_errors():
            try:
                info = self._client().get_job_info(submission_id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        return RayJobStatus(cast(RayStatus, str(info.status.value)), info.message or "")

    def stop(self, submission_id: str) -> None:
        with self._translated_errors():
            try:
                self._client().stop_job(submission_id)
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise

    def logs(self, submission_id: str) -> str | None:
        with self._translated_errors():
            try:
                return str(self._client().get_job_logs(submission_id))
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def nodes(self, submission_ids: Collection[str]) -> list[Node]:
        with self._translated_errors():
            rows = self._get(NODES)["result"]["result"]
            status = self._get("/api/cluster_status").get("clusterStatus")
            actors = self._get(LIVE_ACTORS)["result"]["result"]
            self._ray_jobs = {one: self._ray_jobs.get(one) or self._ray_job(one) for one in submission_ids}
        submissions = {ray_job: one for one, ray_job in self._ray_jobs.items() if ray_job}
        return parse_nodes(rows, status, actors, submissions, time.time())

    def _ray_job(self, submission_id: str) -> str:
        """Return the ID of a submission's Ray job, or an empty string if its driver has not started."""
        try:
            return self._client().get_job_info(submission_id).job_id or ""
        except RuntimeError as error:
            if "status code 404" in str(error):
                return ""
            raise

    def capacity(self) -> Capacity:
        with self._translated_errors():
            nodes = self._get(NODES)["result"]["result"]
            used = used_resources(self._get("/api/cluster_status").get("clusterStatus"))
        alive = [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]
        return Capacity(
            sum(node.get("CPU", 0.0) for node in alive),
            sum(node.get("GPU", 0.0) for node in alive),
            max((parse_bytes(node.get("memory", 0)) for node in alive), default=0.0),
            used.get("CPU", 0.0),
            used.get("GPU", 0.0),
        )

    def _get(self, path: str) -> Any:
        response = self._client()._do_request("GET", path)
        response.raise_for_status()
        return response.json()["data"]

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translate every Ray failure into ClusterUnavailable."""
        import requests

        try:
            yield
        except (requests.RequestException, ConnectionError, RuntimeError, json.JSONDecodeError, KeyError) as error:
            self._job_client = None  # the next call may reach another head
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            is_silent = isinstance(error, requests.ConnectionError | requests.Timeout | ConnectionError)
            kind = ClusterNotResponding if is_silent else ClusterUnavailable
            raise kind(f"Ray at {self._dashboard} does not respond as expected: {first[:300]}") from error

    def _client(self) -> Any:
        if self._job_client is None:
            # These variables would take precedence over the address below.
            for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
                os.environ.pop(name, None)
            from ray.job_submission import JobSubmissionClient

            class ClientWithTimeout(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
                """Adds a timeout to every request, because Ray's client has none."""

                def _do_request(self, *args: Any, **kwargs: Any) -> Any:
                    return super()._do_request(*args, **{"timeout": TIMEOUT_S, **kwargs})

            token = self._token_file.read_text().strip() if self._token_file is not None else ""
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            self._job_client = ClientWithTimeout(self._dashboard, headers=headers)
        return self._job_client


def used_resources(status: dict[str, Any] | None) -> dict[str, float]:
    """Return the amount of each resource in use, or an empty dict if the autoscaler has not written a report."""
    report = (status or {}).get("loadMetricsReport") or {}
    return {name: float(used) for name, (used, _) in (report.get("usage") or {}).items()}
