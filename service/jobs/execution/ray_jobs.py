"""The cluster as the reconciler sees it: submit, look, stop, how much there is. The one place that talks to Ray.

Ray's API answers mistakes in prose and has no time-outs; here both become plain: a status or None, ClusterUnavailable.
Ray is imported when the first question is asked, so the control plane starts without a cluster.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

from service.web.errors import ClusterUnavailable

logger = logging.getLogger(__name__)

TIMEOUT_S = 15.0
STOP_GRACE_S = 60.0  # beyond a job's own deadline, until Ray kills a driver that did not do so itself

RayStatus = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]


class Seen(NamedTuple):
    """What Ray says of a submission."""

    status: RayStatus
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Capacity(NamedTuple):
    """What all living nodes have together."""

    cpus: float
    gpus: float
    memory: float
    """Bytes of the largest node."""


class Cluster(Protocol):
    """All may raise ClusterUnavailable."""

    def submit(self, submission_id: str, job_id: str, attempt: int, root: str, deadline_s: float) -> None:
        """Once: a second time changes nothing."""

    def look(self, submission_id: str) -> Seen | None:
        """None: Ray knows nothing of it."""

    def stop(self, submission_id: str) -> None:
        """Ask it to end; nothing happens where there is nothing to end."""

    def capacity(self) -> Capacity: ...


class RayJobs:
    def __init__(self, dashboard: str, token_file: Path | None, python: str) -> None:
        self._dashboard, self._token_file, self._python = dashboard.rstrip("/"), token_file, python
        self._made: Any = None

    def submit(self, submission_id: str, job_id: str, attempt: int, root: str, deadline_s: float) -> None:
        entrypoint = shlex.join([self._python, "-m", "service.jobs.runner", job_id, str(attempt), root])
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": f"{deadline_s + STOP_GRACE_S:g}", "AMD_JOB": job_id}
        with self._asking():
            try:
                self._client().submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env={"env_vars": environment},
                    metadata={"amd_job": job_id, "amd_attempt": str(attempt)},
                )
            except RuntimeError as error:  # 500 and a traceback, where there is one of that id
                if "already exists" not in str(error):
                    raise

    def look(self, submission_id: str) -> Seen | None:
        with self._asking():
            try:
                info = self._client().get_job_info(submission_id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        return Seen(cast(RayStatus, str(info.status.value)), info.message or "")

    def stop(self, submission_id: str) -> None:
        with self._asking():
            try:
                self._client().stop_job(submission_id)
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise

    def capacity(self) -> Capacity:
        with self._asking():
            answer = self._client()._do_request("GET", "/api/v0/nodes?detail=1&limit=10000")
            answer.raise_for_status()
            nodes = answer.json()["data"]["result"]["result"]
        alive = [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]
        return Capacity(
            sum(node.get("CPU", 0.0) for node in alive),
            sum(node.get("GPU", 0.0) for node in alive),
            max((_bytes(node.get("memory", 0)) for node in alive), default=0.0),
        )

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Every way in which Ray fails to answer, as one."""
        import requests

        try:
            yield
        except (requests.RequestException, ConnectionError, RuntimeError, json.JSONDecodeError, KeyError) as error:
            self._made = None  # it may be another head next time
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ClusterUnavailable(f"Ray at {self._dashboard} does not answer as it should: {first[:300]}") from error

    def _client(self) -> Any:
        if self._made is None:
            for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would outrank the address given here
                os.environ.pop(name, None)
            from ray.job_submission import JobSubmissionClient

            class Bounded(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
                """Ray's client waits for ever."""

                def _do_request(self, *words: Any, **named: Any) -> Any:
                    return super()._do_request(*words, **{"timeout": TIMEOUT_S, **named})

            token = self._token_file.read_text().strip() if self._token_file is not None else ""
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            self._made = Bounded(self._dashboard, headers=headers)
        return self._made


def _bytes(value: Any) -> float:
    """The state API gives memory as a number or as text: 12.5 GiB."""
    if isinstance(value, int | float):
        return float(value)
    number, _, unit = str(value).partition(" ")
    return float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}.get(unit, 1)
