"""A realistic service for the console: jobs in every state with curves and logs, a sweep, encoders and deployments."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine

from amd.storage import join, write_bytes, write_json
from amd.training.run_folder import run_folder
from service.db.models import Job
from service.jobs.execution.protocol import JobFolder
from service.jobs.execution.ray_nodes import Node
from service.jobs.kinds import named, resolve, resources_of
from service.jobs.store import JobStore
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from service.serving.deployments import APP_PREFIX, DeploymentStore, new_deployment
from service.serving.schemas import ServingSettings
from tests.support.encoders.encoder_cards import publish, score
from tests.support.runs.pictures import write_pictures
from tests.support.service.fake_cluster import new_job

RUNNING = "train-20261129-081500-1a2b3c4d"
SUCCEEDED = "train-20261128-190000-5e6f7a8b"
FAILED = "train-20261128-143000-9c0d1e2f"
QUEUED = "train-20261129-093000-3a4b5c6d"
DISTILLED = "train-20261126-010000-00000001"  # one of the ablations
SWEEP = "search-20261129-070000-7e8f9a0b"
ENDED_SWEEP = "search-20261127-070000-0c1d2e3f"
ENCODER = "digits-amd-small"
OTHER_ENCODER = "digits-mae-small"
CLASSIFIER = "digits-classifier"
DEPLOYMENT = "digits"
TEACHER = {"run_id": "demo-image-teacher-5d1e0f7a9b3c", "steps": 2000, "seconds": 71.4, "reused": False}
EMBEDDED = "embed-20261128-200000-2b3c4d5e"  # added by the browser tests
OTHER_EMBEDDED = "embed-20261128-210000-6f7a8b9c"


def populate(engine: Engine, root: str) -> None:
    """Fill a database and a storage root before a service uses them."""
    store = JobStore(engine)
    now = time.time()
    job = add_job(
        *(store, root, RUNNING, "Digits, teacher ratio 0.6", now - 900),
        labels={"team": "vision", "study": "ratios"},
        state="running",
        started_at=now - 840,
        progress={
            "step": 1320,
            "steps": 2000,
            "samples_per_s": 812.4,
            "seconds_left": 431.0,
            "trained_teacher": TEACHER,
        },
    )
    start(store, job)
    write_metrics(root, RUNNING, 1320)
    write_log(root, RUNNING, 400)
    write_checkpoints(root, RUNNING, (500, 1000))
    write_pictures(root, RUNNING, (500, 1000))
    write_faults(root, RUNNING)
    job = add_job(store, root, SUCCEEDED, "Digits baseline without a teacher", now - 54000, preset="demo-image-mae")
    start(store, job)
    write_metrics(root, SUCCEEDED, 2000, 0.2)
    write_log(root, SUCCEEDED, 200)
    finish(store, job.id, "succeeded", result={"figures": {"loss/total": 0.2871, "eval/knn_top1": 96.4}})
    job = add_job(store, root, FAILED, "Learning rate times four", now - 70000, labels={"study": "lr"})
    start(store, job)
    write_metrics(root, FAILED, 240, 0.4)
    write_log(root, FAILED, 60)
    message = "loss/total is not finite at step 241; lower optim.base_lr, or raise schedule.warmup_epochs"
    finish(store, job.id, "failed", reason="nan_loss", message=message, progress={"step": 240, "steps": 2000})
    add_job(
        *(store, root, QUEUED, "Digits, four workers", now - 300),
        message="waiting for 8 CPUs to become free",
        cpus=8.0,
        workers=4,
        priority=-50,  # otherwise jobs submitted by tests could not start before it
    )
    add_sweep(store, root, now - 7200)
    add_ended_sweep(store, root, now - 80000)
    for number in range(24):
        old = add_job(
            *(store, root, f"train-20261126-{number:02d}0000-{number:08x}", f"Ablation {number + 1}"),
            now - 200000 - number * 3600,
            labels={"study": "ablation", "seed": str(number % 3)},
        )
        start(store, old)
        state, reason = ("failed", "oom_gpu") if number % 7 == 3 else ("succeeded", None)
        finish(store, old.id, state if number % 11 else "cancelled", reason=reason)
    add_encoders(engine, root)


def add_job(store: JobStore, root: str, job_id: str, name: str, at: float, **fields: Any) -> Job:
    preset = fields.pop("preset", "demo-image-amd")
    config = resolve("train", preset, None, {"mask.teacher_ratio": 0.6} if preset == "demo-image-amd" else {})
    needs = resources_of(config)
    values: dict[str, Any] = {
        "id": job_id,
        "name": name,
        "preset": preset,
        "config": named("train", config, job_id, root),
        "created_at": at,
        "changed_at": at,
        "not_before": at,
        "cpus": needs.cpus,
        "workers": needs.workers,
        "created_by": "3f9a1c07d2be4488",
        **fields,
    }
    progress, state = values.pop("progress", None), values.pop("state", "queued")
    started_at = values.pop("started_at", None)
    job = store.add(new_job(**values), "3f9a1c07d2be4488")
    return job if progress is None else store.change(job, state, state=state, progress=progress, started_at=started_at)


def start(store: JobStore, job: Job) -> Job:
    job = store.get(job.id)
    attempt = {"submission_id": job.id, "started_at": job.created_at + 20, "state": "running", "message": ""}
    fields = {"started_at": job.created_at + 20, "state": "starting"}
    job = store.change(job, "starting", attempt=attempt, number=1, **fields)
    return store.change(job, "running", state="running", message="")


def finish(store: JobStore, job_id: str, state: str, **fields: Any) -> None:
    job = store.get(job_id)
    outcome = {"log_tail": "Traceback (most recent call last):\n  …\nRuntimeError: stopped", "rank": 0}
    attempt = {
        "state": state,
        "ended_at": job.created_at + 1500,
        "reason": fields.get("reason"),
        "message": fields.get("message", ""),
        "outcome": outcome,
    }
    ended = {"ended_at": job.created_at + 1500, "progress": {"step": 2000, "steps": 2000}, **fields}
    store.change(job, state, attempt=attempt, state=state, **ended)


def write_metrics(root: str, job_id: str, steps: int, shift: float = 0.0) -> None:
    noise = random.Random(job_id)
    lines = [json.dumps(metrics_line(step, noise, shift)) for step in range(0, steps, 5)]
    write_bytes(join(run_folder(root, job_id), "metrics", "000000.jsonl"), "\n".join(lines).encode() + b"\n")


def metrics_line(step: int, noise: random.Random, shift: float = 0.0) -> dict[str, float]:
    """Return the metrics that a 2000-step run logs at the given step."""
    decay = math.exp(-step / 420)
    jitter = noise.gauss(0, 0.012)
    line = {
        "step": step,
        "time": 1.0 * step,
        "loss/total": 0.42 + 1.5 * decay + shift + jitter,
        "loss/reconstruction": 0.21 + 0.6 * decay + shift / 2 + jitter,
        "loss/direct": 0.11 + 0.5 * decay + jitter / 2,
        "loss/generation": 0.10 + 0.4 * decay + jitter / 2,
        "optim/lr": 1.5e-3 * min(1.0, step / 200) * (0.5 + 0.5 * math.cos(math.pi * step / 2000)),
        "optim/grad_norm": 0.4 + 1.2 * decay + abs(noise.gauss(0, 0.08)),
        "speed/samples_per_s": 810 + noise.gauss(0, 14),
        "time/step_s": 0.157 + abs(noise.gauss(0, 0.004)),
        "time/data_s": 0.009 + abs(noise.gauss(0, 0.003)),
    }
    if step % 100 == 0:
        line["eval/knn_top1"] = 97 - 45 * decay + noise.gauss(0, 0.4)
    return line


def write_log(root: str, job_id: str, lines: int, text: str | None = None) -> None:
    rows = [log_line(index) for index in range(lines)]
    rows[len(rows) // 2] = (
        "\x1b[33mWARNING\x1b[0m  a sample cannot be read: demo:digits/17 (1 so far); see bad_samples.jsonl"
    )
    content = text if text is not None else "\n".join(rows) + "\n"
    write_bytes(join(JobFolder(root, job_id).logs(1), f"{0:016d}.log"), content.encode())


def log_line(index: int) -> str:
    return (
        f"\x1b[2m08:15:{index % 60:02d}\x1b[0m \x1b[32mINFO\x1b[0m  step {index * 5} of 2000  "
        f"loss {1.9 / (1 + index / 40):.4f}  812 samples/s  data wait 5.4 %"
    )


def write_checkpoints(root: str, job_id: str, steps: tuple[int, ...]) -> None:
    for step in steps:
        folder = join(run_folder(root, job_id), "checkpoints", f"step-{step:08d}")
        write_json(join(folder, "manifest.json"), {"step": step})


def write_faults(root: str, job_id: str) -> None:
    rows = [{"record": 17, "location": "videos/broken clip.mp4", "reason": "cannot be opened: moov atom not found"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_bytes(join(run_folder(root, job_id), "bad_samples.jsonl"), text.encode())


RATIOS = (
    *((s / 100, t / 100) for s in (60, 70, 80, 90) for t in (30, 45, 60, 75) if t <= s),
    *((0.85, 0.5), (0.75, 0.4), (0.95, 0.6), (0.9, 0.2), (0.65, 0.65)),
)
"""Student and teacher mask ratios of the sweep's trials."""


def start_sweep(store: JobStore, root: str, at: float, sweep: str, name: str, request: dict[str, Any]) -> None:
    values = named("search", resolve("search", "demo-image-amd", request, {}), sweep, root)
    job = store.add(
        new_job(
            id=sweep, kind="search", name=name, preset="demo-image-amd", config=values,
            created_at=at, changed_at=at, workers=3, cpus=3.0, created_by="3f9a1c07d2be4488",
        ),
        "3f9a1c07d2be4488",
    )  # fmt: skip
    start(store, job)
    write_json(join(run_folder(root, sweep), "config.json"), values)


def add_sweep(store: JobStore, root: str, at: float, ratios: Sequence[tuple[float, float]] = RATIOS) -> None:
    request = {"space": {"use": ["masking"]}, "budget": {"trials": 20}, "seeds": 3}
    start_sweep(store, root, at, SWEEP, "Mask ratios of the digits", request)
    store.note_progress(store.get(SWEEP), {"trials": 18, "of_trials": 20, "seconds_left": 1260.0})
    noise = random.Random(7)
    for number, (student, teacher) in enumerate(ratios):
        record = trial_record(number, student, teacher, at, noise)
        write_json(join(run_folder(root, SWEEP), "trials", f"{number:04d}.json"), record)


def add_ended_sweep(store: JobStore, root: str, at: float) -> None:
    """Add a sweep over five settings that succeeded, with its report."""
    space = {"use": ["masking", "recipe", "generator"]}
    request = {"space": space, "budget": {"trials": 24}, "seeds": 1}
    start_sweep(store, root, at, ENDED_SWEEP, "Ratios and recipe", request)
    noise = random.Random(3)
    records = []
    for number in range(24):
        student, teacher = 0.6 + 0.05 * (number % 8), 0.3 + 0.05 * (number % 5)
        record = trial_record(number, student, teacher, at, noise)
        record["state"] = record["state"].replace("running", "stopped").replace("failed", "stopped")
        recipe = {"lr_scale": round(noise.uniform(0.3, 3), 2), "weight_decay": noise.choice([0.02, 0.05, 0.1])}
        point = {**{f"recipe.{name}": value for name, value in recipe.items()}, "generator.depth": 1 + number % 3}
        record["point"] |= point
        record["ended"] = at + 60 * number + 200
        records.append(record)
        write_json(join(run_folder(root, ENDED_SWEEP), "trials", f"{number:04d}.json"), record)
    best = max((one for one in records if len(one["rungs"]) == 3), key=lambda one: one["rungs"][-1]["score"])
    verdict = f"Best of 9 trials that ran to completion: trial {best['number']}. It is not significantly better."
    shares = {"masking.student_ratio": 0.58, "masking.teacher_ratio": 0.27, "recipe.lr_scale": 0.11}
    report = {"verdict": verdict, "importance": {"level": 0, "trials": 24, "shares": shares}}
    write_json(join(run_folder(root, ENDED_SWEEP), "report", "report.json"), report)
    result = {"best": {"number": best["number"], "score": best["rungs"][-1]["score"]}, "verdict": verdict}
    progress = {"trials": 24, "of_trials": 24}
    finish(store, ENDED_SWEEP, "succeeded", result=result, progress=progress)


def trial_record(number: int, student: float, teacher: float, at: float, noise: random.Random) -> dict[str, Any]:
    """Return a ledger record for a trial whose score depends on its mask ratios."""
    best = 97.2 - 60 * (student - 0.8) ** 2 - 28 * (teacher - 0.5) ** 2
    reached = 3 if number % 3 == 0 or best > 96.6 else 1 + number % 2
    rungs = [
        {
            "fraction": fraction,
            "step": int(500 * fraction),
            "score": best - loss + noise.gauss(0, 0.2),
            "figures": {"eval/knn_top1": [best - loss + noise.gauss(0, 0.5) for _ in range(3)]},
            "clips": int(64000 * fraction),
            "seconds": 80 * fraction * (1 - 0.4 * (teacher - 0.3)),
            "time": at + 60 * number,
        }
        for fraction, loss in ((0.2, 6.0), (0.5, 2.2), (1.0, 0.0))[:reached]
    ]
    state = "failed" if number == 11 else "running" if number == 17 else "succeeded" if reached == 3 else "stopped"
    return {
        "number": number,
        "point": {"masking.student_ratio": student, "masking.teacher_ratio": teacher},
        "overrides": {"mask.student_ratio": student, "mask.teacher_ratio": teacher},
        "baseline": number == 0,
        "state": state,
        "reason": "nan_loss" if state == "failed" else None,
        "message": "loss/total is not finite" if state == "failed" else "",
        "runs": [f"{SWEEP}-t{number:04d}-s{seed}" for seed in range(3)],
        "rungs": rungs,
        "costs": {"teacher_gflops": 0.42 * (1 - teacher), "step_gflops": 0.9 * (1 - student) + 0.4},
        "began": at + 60 * number,
        "ended": None if state == "running" else at + 60 * number + 200,
    }


def nodes() -> list[Node]:
    """Return a head, a worker and a node that was lost."""
    memory = 32.0 * 2**30
    sweep, deployed = frozenset({SWEEP}), frozenset({f"{APP_PREFIX}{DEPLOYMENT}"})
    return [
        Node("head-0", "10.0.0.4", True, "alive", "", 4.0, 0.0, memory, 3.0, 0.0, sweep),
        Node("worker-1", "10.0.0.7", False, "alive", "", 4.0, 0.0, memory, 1.5, 0.0, frozenset({RUNNING}), deployed),
        Node("worker-2", "10.0.0.9", False, "lost", "Expected termination: node was preempted", 4.0, 0.0, memory),
    ]


def add_encoders(engine: Engine, root: str) -> None:
    teacher = {"preset": "demo-image-teacher", "encoder": {"size": "demo-teacher"}}
    publish(
        *(root, ENCODER, 900),
        teacher=teacher,
        run=DISTILLED,
        scores=(score("knn", 96.4, "eval/knn_top1"), score("linear", 97.1)),
        weights_license="Apache-2.0",
    )
    publish(root, OTHER_ENCODER, 800, run=SUCCEEDED, objective="mae", scores=(score("knn", 94.8, "eval/knn_top1"),))
    head = {"classes": 10, "labels": [str(number) for number in range(10)]}
    publish(root, CLASSIFIER, 700, objective="finetune", head=head, scores=(score("test", 98.3),))
    encoders, deployments = EncoderStore(engine), DeploymentStore(engine)
    EncoderDiscovery(encoders, root).scan()
    encoders.move_alias("default", "production", OTHER_ENCODER, "test")
    encoders.move_alias("default", "production", ENCODER, "test")
    plain: dict[str, Any] = {"encoder": "production", "settings": ServingSettings()}
    first = new_deployment(DEPLOYMENT, "default", "test", candidate=None, share=0.0, **plain)
    deployments.put(first, resolved={"main": OTHER_ENCODER})
    deployment = new_deployment(DEPLOYMENT, "default", "test", candidate=OTHER_ENCODER, share=0.1, **plain)
    serving = {"main": ENCODER, "candidate": OTHER_ENCODER}
    stored, _ = deployments.put(deployment, resolved=serving)
    deployments.record_status(stored, "healthy", "", serving)
