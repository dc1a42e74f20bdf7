"""Fill a service with any number of jobs, trials, metric points and log lines, for console benchmarks."""

from __future__ import annotations

import json
import random
import time
from typing import NamedTuple

from sqlalchemy import Engine, insert

from amd.storage import join, write_bytes
from amd.training.run_folder import run_folder
from service.db.models import Attempt, Job, JobEvent
from service.jobs.execution.protocol import JobFolder
from service.jobs.store import JobStore
from tests.support.browser import scenes
from tests.support.service.fake_cluster import new_job

STATES = ("succeeded", "succeeded", "succeeded", "failed", "failed", "cancelled", "queued", "queued", "running")
QUEUED = "train-20261120-000006"  # the first waiting job of every volume
CHUNK_LINES = 20  # metrics that a run logs in 30 seconds
LOG_CHUNK_LINES = 200
BATCH = 1000


class Volume(NamedTuple):
    """Amounts of data to create."""

    jobs: int
    trials: int
    points: int
    log_lines: int


def populate(engine: Engine, root: str, volume: Volume) -> None:
    """Fill a database and a storage root. The job RUNNING has all metric points and log lines, SWEEP all trials."""
    store, now = JobStore(engine), time.time()
    progress = {"step": 1320, "steps": 2000, "samples_per_s": 812.4, "seconds_left": 431.0}
    job = scenes.add_job(
        *(store, root, scenes.RUNNING, "Digits, teacher ratio 0.6", now - 900),
        state="running",
        started_at=now - 840,
        progress=progress,
    )
    scenes.start(store, job)
    scenes.write_checkpoints(root, scenes.RUNNING, (500, 1000))
    scenes.write_faults(root, scenes.RUNNING)
    write_points(root, scenes.RUNNING, volume.points)
    write_log_lines(root, scenes.RUNNING, volume.log_lines)
    ratios = random.Random(volume.trials)
    scenes.add_sweep(store, root, now - 7200, [_ratios(ratios) for _ in range(volume.trials)])
    _add_jobs(engine, volume.jobs - 2, store.get(scenes.RUNNING).config, now)
    scenes.add_encoders(engine, root)


def _ratios(choice: random.Random) -> tuple[float, float]:
    student = choice.uniform(0.5, 0.95)
    return round(student, 3), round(choice.uniform(0.2, student), 3)


def write_points(root: str, job_id: str, points: int) -> None:
    """Write at least this many metric points, in chunks, as a run does."""
    noise, step, chunk, number = random.Random(job_id), 0, list[str](), 0
    while points > 0:
        line = scenes.metrics_line(step, noise)
        points -= sum("/" in name for name in line)
        chunk.append(json.dumps(line))
        step += 5
        if len(chunk) == CHUNK_LINES or points <= 0:
            text = "\n".join(chunk) + "\n"
            write_bytes(join(run_folder(root, job_id), "metrics", f"{number:06d}.jsonl"), text.encode())
            chunk, number = [], number + 1


def write_log_lines(root: str, job_id: str, lines: int) -> None:
    folder, offset = JobFolder(root, job_id).logs(1), 0
    for start in range(0, lines, LOG_CHUNK_LINES):
        rows = [scenes.log_line(index) for index in range(start, min(lines, start + LOG_CHUNK_LINES))]
        content = ("\n".join(rows) + "\n").encode()
        write_bytes(join(folder, f"{offset:016d}.log"), content)
        offset += len(content)


def _add_jobs(engine: Engine, count: int, config: dict[str, object], now: float) -> None:
    columns = [column.name for column in Job.__table__.columns]
    for start in range(0, count, BATCH):
        jobs = [_job(number, config, now) for number in range(start, min(count, start + BATCH))]
        begun = [job for job in jobs if job.attempt]
        with engine.begin() as connection:
            connection.execute(insert(Job), [{name: getattr(job, name) for name in columns} for job in jobs])
            connection.execute(insert(JobEvent), [_event(job) for job in jobs])
            if begun:
                connection.execute(insert(Attempt), [_attempt(job) for job in begun])


def _job(number: int, config: dict[str, object], now: float) -> Job:
    state, at = STATES[number % len(STATES)], now - 3600 - 60 * number
    begun, ended = state != "queued", state in ("succeeded", "failed", "cancelled")
    return new_job(
        id=f"train-20261120-{number:06}",
        name=f"Ablation {number}",
        preset="demo-image-amd",
        config=config,
        state=state,
        reason="oom_gpu" if state == "failed" else None,
        message="out of memory on rank 1" if state == "failed" else "waiting for 8 CPUs" if not begun else "",
        attempt=int(begun),
        not_before=at,
        created_at=at,
        changed_at=at,
        started_at=at + 20 if begun else None,
        ended_at=at + 1500 if ended else None,
        progress={"step": 1000, "steps": 2000, "samples_per_s": 800.0, "seconds_left": 600.0} if begun else None,
        version=1,
    )


def _event(job: Job) -> dict[str, object]:
    return {"job_id": job.id, "version": 1, "at": job.created_at, "type": "created", "actor": "test", "data": {}}


def _attempt(job: Job) -> dict[str, object]:
    return {
        "job_id": job.id,
        "number": 1,
        "submission_id": job.id,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "state": job.state,
        "reason": job.reason,
        "message": job.message,
        "outcome": {"rank": 1, "log_tail": "RuntimeError: out of memory"} if job.state == "failed" else None,
    }
