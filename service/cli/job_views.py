"""A job as text: its state, progress and reason, and the table of `amd jobs show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from amd.training.run_folder import BAD_SAMPLES
from service.cli.tables import facts_table
from service.cli.times import ago, duration

if TYPE_CHECKING:
    from service.jobs.schemas import JobDetail, JobView

COLOURS = {"succeeded": "green", "failed": "red", "running": "cyan", "cancelled": "yellow", "paused": "yellow"}


def reason_text(job: JobView) -> str:
    reason = f" ({job.reason})" if job.reason else ""
    return f"{reason}: {job.message}" if job.message else reason


def state_text(job: JobView) -> Text:
    return Text(job.state, style=COLOURS.get(job.state, ""))


def progress_text(job: JobView) -> str:
    progress = job.progress
    if progress is None:
        return ""
    if progress.of_trials:
        return f"{progress.trials or 0}/{progress.of_trials} trials"
    if not progress.steps:
        return ""
    left = f", {duration(progress.seconds_left)} left" if progress.seconds_left and job.state == "running" else ""
    return f"{'teacher ' if progress.teacher else ''}{progress.step or 0}/{progress.steps}{left}"


def teacher_text(job: JobView) -> str:
    if job.teacher is None:
        return ""
    return f"{job.teacher.steps} steps in {duration(job.teacher.seconds)}{', reused' if job.teacher.reused else ''}"


def bad_samples_text(job: JobView) -> str:
    figures = (job.result or {}).get("figures") or {}
    count = int(figures.get("data/bad_samples", 0))
    return f"{count}, listed in {job.run_folder}/{BAD_SAMPLES}" if count else ""


def details_table(job: JobDetail) -> Table:
    return facts_table(
        [
            ("id", job.id),
            ("state", Text.assemble(state_text(job), reason_text(job))),
            ("kind", job.kind + (f", preset {job.preset}" if job.preset else "")),
            ("name", job.name or ""),
            ("labels", ", ".join(f"{key}={value}" for key, value in job.labels.items())),
            ("project", job.project),
            ("progress", progress_text(job)),
            ("teacher", teacher_text(job)),
            ("attempt", f"{job.attempt} (up to {job.max_retries} automatic retries)" if job.attempt else ""),
            ("created", f"{ago(job.created_at)} by {job.created_by}"),
            ("run", job.run_folder),
            ("bad samples", bad_samples_text(job)),
            ("encoder", job.encoder or ""),
            ("actions", ", ".join(job.allowed_actions)),
            ("log tail", job.failure.log_tail if job.failure is not None and job.failure.log_tail else ""),
        ]
    )
