"""Writes this fixture: run `python write.py` with version 0.1 of the code (commit 1d7ba12) on the import path.

Kept as a record of how the files were created. It imports modules of version 0.1 and works with no other version.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from amd.training.launch import launch, train
from amd.training.metrics import read_metrics
from amd.training.progress import Silence
from service.encoders.deployments import DeploymentStore
from service.encoders.discovery import EncoderDiscovery
from service.encoders.store import EncoderStore
from service.jobs.outcome import JobFolder, Outcome
from sqlalchemy.orm import Session
from tune_spaces.progress import Quiet
from tune_spaces.sweep import Sweep
from tune_spaces.trial import reports

from amd.artifacts import encode, load_encoder
from amd.config import ProbeConfig, TrainConfig, validate, with_overrides
from amd.downstream.probing import run_probe
from service.auth import Secret
from service.db import Deployment, Job, Key, migrate, open_engine
from service.jobs.store import JobStore
from service.webhooks.store import WebhookStore
from tune_spaces.config import SearchConfig
from tune_spaces.report import write_report
from tune_spaces.search import _open, prepared

HERE = Path(__file__).parent
PLACEHOLDER = "/amd-store-0.1"  # stands for the absolute path of the storage root
STOP_AFTER = 6
KEY = Secret("0123456789abcdef", "A" * 43)
ENCODER = {"width": 16, "depth": 2, "heads": 2, "class_token": True, "positions": "sincos_2d"}
ENDED_ATTEMPTS = {
    "retrying": {"state": "failed", "reason": "node_lost"},
    "paused": {"state": "cancelled", "reason": "cancelled_by_user"},
    "cancelled": {"state": "cancelled", "reason": "cancelled_by_user"},
}
PROBE_DATA = {"train": "demo:digits/few", "test": "demo:digits/select", "loader_workers": 0}


def config(root: str, name: str | None, **overrides: Any) -> TrainConfig:
    """Return the config of an AMD run of 12 steps on 100 images of digits."""
    values = {
        "clip": {"frames": 1, "size": 16, "patch": 4, "tubelet": 1},
        "student": {
            "encoder": ENCODER,
            "decoder": {"width": 16, "depth": 1, "heads": 2, "input_bias": True},
            "generator": {"depth": 1, "heads": 1},
        },
        "teacher": {"encoder": ENCODER, "weights": "tiny-teacher"},
        "mask": {"strategy": "random", "student_ratio": 0.75, "teacher_ratio": 0.5},
        "objective": {"kind": "amd", "pixels": "per_patch", "layers": [{"student": 2, "teacher": 2}]},
        "data": {"train": "demo:digits/few", "loader_workers": 0, "crop": "random_resized"},
        "optim": {"batch_size": 8, "base_lr": 0.01},
        "schedule": {"steps": 12, "warmup_steps": 2},
        "scaling": {"device": "cpu", "threads_per_worker": 1},
        "tracking": {"tensorboard": False, "log_every_steps": 1},
        "checkpoint": {"every_steps": 4, "keep_last": 1},
        "storage": root,
        "name": name,
    }
    return with_overrides(validate(TrainConfig, values), overrides)


class StopAt(Silence):
    """Stops a run once it has logged a step."""

    def __init__(self, step: int) -> None:
        self.stop, self.step = threading.Event(), step

    def see(self, event: Any) -> None:
        if event["kind"] == "step" and event["step"] >= self.step:
            self.stop.set()


def example() -> torch.Tensor:
    """Return two images, (2, 3, 1, 16, 16) uint8."""
    return (torch.arange(2 * 3 * 16 * 16) * 37 % 251).to(torch.uint8).reshape(2, 3, 1, 16, 16)


def embedding(root: str, encoder_id: str) -> list[list[float]]:
    encoder, card = load_encoder(f"{root}/encoders/{encoder_id}")
    with torch.no_grad():
        return encode(encoder, card.clip, example(), card.pooling).tolist()


def losses(root: str, run_id: str) -> list[dict[str, float]]:
    """Return the losses at each step; for a step that ran twice, the later ones."""
    return [
        {name: value for name, value in line.items() if name == "step" or name.startswith("loss/")}
        for line in read_metrics(f"{root}/runs/{run_id}")
        if "loss/total" in line
    ]


def write_runs(root: str) -> dict[str, Any]:
    mae = {"teacher": None, "objective.kind": "mae", "objective.layers": [], "tracking.tensorboard": True}
    finished = train(config(root, "tiny-teacher", **mae), local=True, quiet=True)
    assert finished.state == "succeeded", finished
    values = {"encoder": "tiny-teacher", "storage": root, "data": PROBE_DATA, "kinds": ["knn", "linear"]}
    linear = {"method": "logistic"}
    run_probe(validate(ProbeConfig, {**values, "linear": linear, "scaling": {"device": "cpu"}}))

    watching = StopAt(STOP_AFTER)
    student = config(root, "tiny-student")
    stopped = train(student, local=True, stop=watching.stop, watching=watching)
    assert (stopped.state, stopped.reason) == ("cancelled", "cancelled_by_user"), stopped

    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(root, f"{folder}/root")
        ended = train(with_overrides(student, {"storage": str(copy)}), local=True, quiet=True)
        assert ended.state == "succeeded", ended
        return {
            "embeddings": {
                "tiny-teacher": embedding(root, "tiny-teacher"),
                "tiny-student": embedding(str(copy), "tiny-student"),
            },
            "losses": {
                "tiny-teacher": losses(root, "tiny-teacher"),
                "tiny-student": losses(str(copy), "tiny-student"),
            },
            "stopped_after": stopped.steps,
        }


def write_sweep(root: str) -> dict[str, Any]:
    """Write a sweep: trial 0 finished, 1 stopped at its first rung, 2 running past its first rung, 3 to 5 pending."""
    base = config(root, None, **{"schedule.steps": 8, "probe": {"data": PROBE_DATA, "knn": {"neighbours": 3}}})
    values = {"space": {"use": ["masking"]}, "rungs": 2, "budget": {"trials": 6}, "seed": 5, "name": "tiny-sweep"}
    search = SearchConfig.model_validate({"train": base.model_dump(mode="json"), "storage": root, **values})
    search, space = prepared(search, root, "tiny-sweep")
    folder = f"{root}/runs/tiny-sweep"
    _open(folder, search)
    sweep = Sweep(search, space, root, "tiny-sweep", Quiet())
    for rungs in (2, 1, 1):
        record = sweep.begin()
        assert record is not None
        run = partial(launch, local=True)
        told = reports(sweep.task(record), threading.Event(), Silence(), run=run)
        for _ in range(rungs):
            sweep.hear(record.number, next(told))
        told.close()
        if record.number < 2:
            sweep.ended(record.number)
    write_report(folder)
    with tempfile.TemporaryDirectory() as scratch:
        copy = str(shutil.copytree(root, f"{scratch}/root"))
        again = Sweep(search, space, copy, "tiny-sweep", Quiet())
        begun = [again.begin() for _ in range(3)]
        return {
            "states": {record.number: record.state for record in sweep.records.values()},
            "next": [{"number": r.number, "point": r.point, "level": r.level, "runs": r.runs} for r in begun if r],
        }


def write_job_files(root: str, job_id: str) -> dict[str, Any]:
    """Run an export as a job's driver does."""
    folder = JobFolder(root, job_id)
    values = {"encoder": "tiny-teacher", "format": "timm", "storage": root, "output": folder.output}
    Path(folder.url).mkdir(parents=True)
    Path(folder.config).write_text(json.dumps(values))
    Path(folder.request).write_text(json.dumps({"kind": "export"}))
    subprocess.run([sys.executable, "-m", "service.jobs.runner", job_id, "1", root], check=True)
    word = folder.hear(1)
    assert word is not None
    assert word.outcome is not None
    assert word.outcome.state == "succeeded", word
    return word.outcome.model_dump(mode="json")


def job(job_id: str, kind: str, values: dict[str, Any], **fields: Any) -> Job:
    now = time.time()
    standard = {
        "id": job_id, "project": "default", "kind": kind, "name": f"a job of kind {kind}", "labels": {"team": "vision"},
        "priority": 0, "origin": "api", "created_by": KEY.id, "config": values, "max_retries": 3, "workers": 1,
        "cpus": 1.0, "device": "cpu", "wanted": "run", "state": "queued", "message": "", "attempt": 0, "retries": 0,
        "not_before": now, "created_at": now, "changed_at": now,
    }  # fmt: skip
    return Job(**{**standard, **fields})


def write_database(root: str, path: Path, export: dict[str, Any], export_id: str) -> dict[str, Any]:
    engine = open_engine(f"sqlite:///{path}")
    migrate(engine)
    with Session(engine) as session, session.begin():
        for secret, project, scopes, revoked in (
            (KEY, None, ["admin"], None),
            (Secret("fedcba9876543210", "B" * 43), "video", ["read"], time.time()),
        ):
            session.add(
                Key(
                    id=secret.id, name="of the fixture", project=project, scopes=scopes, digest=secret.digest,
                    created_at=time.time(), created_by="service", expires_at=None, revoked_at=revoked, used_at=None,
                )
            )  # fmt: skip
    store, encoders = JobStore(engine), EncoderStore(engine)
    webhook = WebhookStore(engine).add("https://hooks.example.com/amd", "default", ["succeeded"], KEY.id)
    states: dict[str, str] = {}
    values = config(root, None).model_dump(mode="json")

    def begin(found: Job) -> Job:
        begun = {"submission_id": found.id, "started_at": time.time(), "state": "running", "message": ""}
        return store.change(found, "starting", state="starting", attempt=begun, number=1, started_at=time.time())

    progress = {"step": 6, "steps": 12, "samples_per_s": 100.0, "seconds_left": 1.0}
    ways: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "queued": [],
        "starting": [],
        "running": [("running", {})],
        "retrying": [("retrying", {"reason": "node_lost", "message": "retry 1 of 3", "retries": 1})],
        "pausing": [("pausing", {"wanted": "pause", "stop_by": time.time() + 60})],
        "paused": [("paused", {"wanted": "pause"})],
        "cancelling": [("cancelling", {"wanted": "cancel", "stop_by": time.time() + 60})],
        "failed": [("failed", {"reason": "nan_loss", "message": "the loss is not finite", "ended_at": time.time()})],
        "cancelled": [("cancelled", {"wanted": "cancel", "reason": "cancelled_by_user", "ended_at": time.time()})],
    }
    for number, (state, moves) in enumerate(ways.items()):
        name = f"train-20260101-00000{number}-0000000{number}"
        added = job(name, "train", {**values, "name": name}, preset="demo-image-amd")
        found, _ = store.add_once(added, KEY.id, f"fixture-{number}", f"POST {name}".encode())
        if state != "queued":
            found = begin(found)
        if state == "failed":
            outcome = Outcome(state="failed", reason="nan_loss", message="the loss is not finite", rank=0, exit_code=1)
            ended = {"state": "failed", "reason": "nan_loss", "message": outcome.message, "ended_at": time.time()}
            ended["outcome"] = outcome.model_dump(mode="json")
            found = store.change(found, "failed", attempt=ended, progress=progress, **moves[0][1], state="failed")
        else:
            for event, fields in moves:
                attempt = ENDED_ATTEMPTS.get(event)
                attempt = attempt and {**attempt, "message": "", "ended_at": time.time()}
                found = store.change(found, event, attempt=attempt, **{"state": event, **fields})
            if state == "running":
                store.note_progress(found, progress)
        states[name] = state
    values = json.loads(Path(JobFolder(root, export_id).config).read_text())
    found = begin(store.add(job(export_id, "export", values), KEY.id))
    found = store.change(found, "running", state="running", progress={"step": 1, "steps": 1})
    ended = {"state": "succeeded", "message": "", "ended_at": time.time(), "outcome": export}
    store.change(found, "succeeded", state="succeeded", attempt=ended, result=export["result"], ended_at=time.time())
    states[export_id] = "succeeded"
    found = store.add(job("tiny-teacher", "train", {}, origin="external", state="succeeded", labels={}), "someone")
    states[found.id] = "succeeded"

    EncoderDiscovery(encoders, root).look()
    encoders.move("default", "best", "tiny-teacher", KEY.id)
    now = time.time()
    wanted = Deployment(
        name="digits", project="default", encoder="best", candidate=None, share=0.0, settings={}, serving={},
        state="deploying", message="", created_by=KEY.id, created_at=now, changed_at=now, version=1,
    )  # fmt: skip
    DeploymentStore(engine).put(wanted)
    store.hold("reconciler", "a control plane that is gone", 1.0)
    engine.dispose()
    return {
        "key": str(KEY),
        "job_states": states,
        "encoders": ["tiny-sweep-0000-s0", "tiny-teacher"],
        "aliases": {"best": "tiny-teacher"},
        "deployments": {"digits": "best"},
        "webhooks": {webhook.id: webhook.url},
        "deliveries": [export_id],
        "idempotency_keys": [f"fixture-{number}" for number in range(len(ways))],
    }


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AMD_DEMO_DIR"] = f"{folder}/demo"
        root, export_id = f"{folder}/root", "export-20260101-000009-00000009"
        Path(root).mkdir()
        expected: dict[str, Any] = {"runs": write_runs(root), "sweep": write_sweep(root)}
        export = write_job_files(root, export_id)
        database = Path(folder) / "control-plane.db"
        expected["database"] = write_database(root, database, export, export_id)
        with sqlite3.connect(database) as connection:
            dump = "\n".join(connection.iterdump()) + "\n"
        shutil.rmtree(HERE / "root", ignore_errors=True)
        shutil.copytree(root, HERE / "root", ignore=shutil.ignore_patterns("*.png", "*.svg"))
        for path in (HERE / "root").rglob("*"):
            if path.is_file() and path.suffix in (".json", ".jsonl", ".md", ".log"):
                path.write_text(neutral(path.read_text(), root))
        (HERE / "control-plane.sql").write_text(neutral(dump, root))
        (HERE / "expected.json").write_text(neutral(json.dumps(expected, indent=1), root) + "\n")


def neutral(text: str, root: str) -> str:
    """Replace the storage root, platform and host name, which depend on the machine."""
    text = text.replace(root, PLACEHOLDER).replace(platform.platform(), "Linux")
    return text.replace(f'"{socket.gethostname()}"', '"node"')


if __name__ == "__main__":
    main()
