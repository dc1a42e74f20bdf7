"""Tests for measuring committed work, by which the reconciler recognizes that a job makes progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amd.storage import write_json
from service.db.models import Job
from service.jobs.execution.committed import committed_work, has_grown, newest_checkpoint


def commit(root: Path, run: str, step: int) -> None:
    write_json(str(root / "runs" / run / "checkpoints" / f"step-{step:08d}" / "manifest.json"), {})


def job_of(kind: str, progress: dict[str, Any] | None = None) -> Job:
    return Job(id="job", kind=kind, progress=progress)


def test_committed_work_includes_the_checkpoints_of_a_teacher_trained_first(tmp_path: Path) -> None:
    job = job_of("train", {"run": "teacher"})
    assert committed_work(str(tmp_path), job) == {}
    commit(tmp_path, "teacher", 40)
    teacher = committed_work(str(tmp_path), job)
    assert (teacher, newest_checkpoint(job, teacher)) == ({"teacher": 40}, 40)
    job.progress = {"run": "job"}
    assert not has_grown(teacher, committed_work(str(tmp_path), job))
    commit(tmp_path, "job", 4)
    student = committed_work(str(tmp_path), job)
    assert has_grown(teacher, student)
    assert newest_checkpoint(job, student) == 4


def test_committed_work_of_a_sweep_includes_ended_trials_and_the_checkpoints_of_running_trials(tmp_path: Path) -> None:
    job = job_of("search")
    trials = tmp_path / "runs" / "job" / "trials"
    for number, state in enumerate(("running", "running", "stopped", "failed")):
        write_json(str(trials / f"{number:04d}.json"), {"state": state, "runs": [f"trial-{number}"]})
        commit(tmp_path, f"trial-{number}", 10 + number)
    before = committed_work(str(tmp_path), job)
    assert before == {"trial-0": 10, "trial-1": 11, "ended trials": 2}
    write_json(str(trials / "0001.json"), {"state": "succeeded", "runs": ["trial-1"]})
    assert has_grown(before, committed_work(str(tmp_path), job))


def test_committed_work_of_jobs_without_runs_grows_with_their_output_files(tmp_path: Path) -> None:
    for kind in ("embed", "prepare"):
        job = job_of(kind)
        output = tmp_path / "jobs" / "job" / "output" / kind
        before = committed_work(str(tmp_path), job)
        write_json(str(output / "0.json"), {})
        assert has_grown(before, committed_work(str(tmp_path), job))
