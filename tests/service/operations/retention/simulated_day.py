"""A simulated day of service traffic: jobs, sweeps, encoders, aliases, deployments and deletions, on a fake clock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine

from service.db.models import Job
from service.jobs.actions import act, allowed_actions
from service.jobs.schemas import DELETED, ENDED
from service.jobs.store import JobFilter
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderFilter, EncoderStore
from service.serving.deployments import DeploymentStore, new_deployment
from service.serving.schemas import ServingSettings
from service.web.errors import EncoderInUse, IllegalAction, NotFound
from tests.service.operations.retention.stored_data import DAY_S, REFERENCES, run_files
from tests.support.encoders.encoder_cards import publish
from tests.support.service.fake_cluster import queued, report_status
from tests.support.service.fake_control_plane import FakeControlPlane

HOUR_S = 3600.0
CHANGES = (
    *("wait", "submit", "progress", "end", "act") * 2,
    *("run_by_hand", "move_alias", "delete_alias", "deploy", "undeploy", "delete_encoder"),
)
"""Names of the changes; the most frequent ones are listed twice."""
SIZE = 100  # bytes of checkpoints, logs and weights
T = TypeVar("T")


class SimulatedDay:
    """A control plane with a storage root. Each kind of change has a method, whose `number` determines the details."""

    def __init__(self, engine: Engine, root: Path) -> None:
        root.mkdir()
        self.root, self._now = root, time.time() - 10 * DAY_S
        self.plane = FakeControlPlane(engine, root, max_running=3)
        self._jobs, self._encoders, self._deployments = self.plane.store, EncoderStore(engine), DeploymentStore(engine)
        self._references: dict[str, str] = {}  # the ID that a job's or run's config refers to
        self._count = 0

    def clock(self) -> float:
        return self._now

    def make(self, change: str, number: int) -> None:
        """Make a change, then let the control plane apply it."""
        getattr(self, change)(number)
        self.plane.step(2)
        self.plane.reconciler._deletions._remover.submit(lambda: None).result()  # removes files in another thread
        self.plane.step()
        EncoderDiscovery(self._encoders, str(self.root), clock=self.clock).scan()
        for path in self.root.rglob("*"):
            if path.is_file() and path.stat().st_mtime > self._now + DAY_S:  # written since, by the real clock
                os.utime(path, (self._now, self._now))

    def wait(self, number: int) -> None:
        self._now += (1 + number % 6) * HOUR_S

    def submit(self, number: int) -> None:
        self._count += 1
        kind = "search" if number % 4 == 0 else "train"
        job_id = f"{kind}-{self._count}"
        queued(self._jobs, id=job_id, kind=kind, config=self._config(job_id, number))

    def run_by_hand(self, number: int) -> None:
        """Write a failed run that `amd train` started outside the service."""
        self._count += 1
        run = f"by-hand-{self._count}"
        self._write_run(run, self._config(run, number), None)
        self._write(f"runs/{run}/result.json", json.dumps({"state": "failed"}))

    def progress(self, number: int) -> None:
        """Write the files that an active job writes before it ends."""
        if (job := _choose(self._jobs.in_states(("starting", "running")), number)) is not None:
            config = self._jobs.get(job.id).config
            self._write_run(job.id, config, job.id)
            self._write(f"jobs/{job.id}/logs/0001/0000000000000000.log", "l" * SIZE)
            self._write(f"jobs/{job.id}/output/.part.tar.0123abcd", "unfinished")
            for trial in self._trials(job):
                self._write_run(trial, {"name": trial}, job.id)
                self._write(f"runs/{trial}/result.json", json.dumps({"state": "stopped"}))
                self._write(f"runs/{job.id}/trials/{trial[-7:-3]}.json", json.dumps({"runs": [trial]}))
            report_status(str(self.root), job)

    def end(self, number: int) -> None:
        """End an active job; some successful jobs publish an encoder."""
        job = _choose(self._jobs.in_states(("running", "pausing", "cancelling")), number)
        if job is None:
            return
        state = ("succeeded", "failed")[number % 2] if job.state == "running" else "cancelled"
        self._write(f"runs/{job.id}/result.json", json.dumps({"state": state}))
        result = None
        if state == "succeeded" and number % 3:
            publish(str(self.root), job.id, run=job.id, config=self._jobs.get(job.id).config, weights=b"w" * SIZE)
            result = {"encoder_folder": str(self.root / "encoders" / job.id)}
        reason = "invalid_config" if state == "failed" else None
        report_status(str(self.root), job, state, reason, result=result)

    def act(self, number: int) -> None:
        """Pause, resume, cancel, retry or delete a job."""
        job = _choose(self._jobs.list(JobFilter(origin="api"), limit=100).jobs, number)
        if job is not None and (action := _choose(allowed_actions(job), number // 7)) is not None:
            act(self._jobs, job.id, None, action, "me", clock=self.clock)

    def move_alias(self, number: int) -> None:
        if (encoder := self._encoder(number)) is not None:
            with suppress(IllegalAction):
                self._encoders.move_alias("default", f"alias-{number % 2}", encoder, "me")

    def delete_alias(self, number: int) -> None:
        with suppress(NotFound):
            self._encoders.delete_alias("default", f"alias-{number % 2}", "me")

    def deploy(self, number: int) -> None:
        if (encoder := self._encoder(number)) is not None:
            name = f"alias-{number % 2}" if number % 3 else encoder
            both = {"encoder": name, "candidate": encoder, "share": 0.1}
            desired = new_deployment(f"d{number % 2}", "default", "me", settings=ServingSettings(), **both)
            self._deployments.put(desired)

    def undeploy(self, number: int) -> None:
        with suppress(NotFound):
            self._deployments.delete(f"d{number % 2}", None, "me")

    def delete_encoder(self, number: int) -> None:
        if (encoder := self._encoder(number)) is not None:
            with suppress(EncoderInUse):
                self._encoders.delete_encoder(encoder, None, str(self.root), "me")

    def in_use(self) -> set[str]:
        """Return the IDs to keep: unfinished jobs, their trials, encoders, alias targets, and all they refer to."""
        live = [job for job in self._all_jobs() if job.state not in ENDED]
        found = {job.id for job in live} | {trial for job in live for trial in self._trials(job)}
        found |= {path.parent.name for path in self.root.glob("encoders/*/encoder.json")}
        found |= {alias.encoder_id for alias in self._encoders.aliases(None)}
        found |= {name for one in self._deployments.all() for name in (one.encoder, one.candidate) if name}
        while new := {self._references[id] for id in found & self._references.keys() if self._has_config(id)} - found:
            found |= new
        return found

    def names(self) -> dict[str, str]:
        """Return the encoder that each alias points to."""
        return {alias.name: alias.encoder_id for alias in self._encoders.aliases(None)}

    def _all_jobs(self) -> Sequence[Job]:
        return self._jobs.list(JobFilter(), limit=1000).jobs

    def _encoder(self, number: int) -> str | None:
        return _choose([one.id for one in self._encoders.list(EncoderFilter()).encoders], number)

    def _has_config(self, id: str) -> bool:
        """Return whether a file or row still records what a run, job or encoder refers to."""
        jobs = {job.id for job in self._all_jobs() if job.state not in DELETED}
        paths = (f"runs/{id}/config.json", f"jobs/{id}/config.json", f"encoders/{id}/encoder.json")
        return id in jobs or any((self.root / path).exists() for path in paths)

    def _config(self, id: str, number: int) -> dict[str, object]:
        known = sorted({path.name for path in self.root.glob("*/*") if path.is_dir()})
        target = _choose(known, number) if number % 3 else None
        if target is not None:
            self._references[id] = target
        weights = "" if target is None else REFERENCES[number % len(REFERENCES)].format(id=target, root=self.root)
        return {"name": id, "teacher": {"weights": weights}}

    @staticmethod
    def _trials(job: Job) -> list[str]:
        return [f"{job.id}-000{trial}-s0" for trial in range(2)] if job.kind == "search" else []

    def _write_run(self, id: str, config: dict[str, object], owner: str | None) -> None:
        for name, content in run_files(id, config, owner, SIZE).items():
            self._write(f"runs/{id}/{name}", content)

    def _write(self, path: str, content: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def _choose(items: Sequence[T], number: int) -> T | None:
    return items[number % len(items)] if items else None
