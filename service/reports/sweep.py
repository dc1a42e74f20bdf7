"""A sweep's history, as shown on its page and in its report: trials, verdict, mask ratio map and cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from amd.config import ConfigError
from amd.storage import exists, join, read_json
from amd.training.run_folder import run_folder
from service.db.models import Job
from service.web.errors import NotFound
from tune_spaces.report.figures import MIN_IMPORTANCE_TRIALS, Importance, TrialRow
from tune_spaces.report.formatting import title
from tune_spaces.report.page import baseline_difference
from tune_spaces.report.ratio_map import RatioMap, ratio_map
from tune_spaces.report.sweep import SweepHistory, TrialHistory, dimensions, read_sweep
from tune_spaces.report.verdict import METRIC_NAMES

RELIABLE_TRIALS = 50  # fewer trials give only a rough guide to importance
NO_IMPORTANCE = (
    f"The importance of the settings cannot be estimated: it needs at least {MIN_IMPORTANCE_TRIALS} trials at the same "
    "rung with different scores, and at least two settings that vary. Studies and populations have none."
)


class TrialPoint(NamedTuple):
    """One trial, as shown on the sweep's page and in its report."""

    number: int
    title: str
    point: dict[str, Any]
    state: str
    rung: int
    """Highest rung reached, starting at 1; 0 if there is none."""
    score: float | None
    spread: float | None
    """Standard deviation of the score across seeds at the highest rung reached."""
    speed: float | None
    gflops: float | None
    best: bool
    baseline: bool
    reason: str
    stop_requested: bool
    runs: tuple[str, ...]


class ImportanceView(NamedTuple):
    """How much the score depends on each setting."""

    shares: list[tuple[str, float]]
    """(setting, share of the score's variance), in descending order; empty if there is no estimate."""
    note: str


class BaselineDifference(NamedTuple):
    """Difference of a trial's score from that of the base config."""

    points: float | None
    """None for the trial with the base config, and for a trial that shares no rung with it."""
    text: str
    """The difference with its 95 % interval, paired by seed."""


def read_job_sweep(job: Job, root: str) -> tuple[SweepHistory | None, str]:
    """Return the sweep's history, or None and the reason why it is unavailable. Raises NotFound for other jobs."""
    if job.kind != "search":
        raise NotFound(f"{job.id} is not a sweep")
    folder = run_folder(root, job.id)
    try:
        return read_sweep(folder), ""
    except ConfigError as error:
        return None, str(error).removeprefix(f"{folder}: ")


def trial_points(sweep: SweepHistory, stops: Collection[int] = ()) -> list[TrialPoint]:
    """Return a sweep's trials. `stops`: numbers of the trials that have been asked to stop."""
    names, best = dimensions(sweep), sweep.best
    return [_point(sweep, one, names, one is best, one.number in stops) for one in sweep.trials]


def ranked(trials: list[TrialPoint]) -> list[TrialPoint]:
    """Return the trials, best first: by rung, then by score. Failed trials are last."""
    return sorted(trials, key=lambda one: (one.state == "failed", -one.rung, -(one.score or 0.0), one.number))


def _point(
    sweep: SweepHistory, trial: TrialHistory, names: dict[str, str], best: bool, stop_requested: bool
) -> TrialPoint:
    rung = trial.rungs.get(trial.reach)
    seeds = sweep.seeds(rung) if rung is not None else ()
    mean = sum(seeds) / len(seeds) if seeds else 0.0
    spread = (sum((value - mean) ** 2 for value in seeds) / (len(seeds) - 1)) ** 0.5 if len(seeds) > 1 else None
    record = trial.record
    return TrialPoint(
        number=record.number,
        title=title(record.point, names),
        point=record.point,
        state=record.state,
        rung=trial.reach + 1,
        score=rung.score if rung is not None else None,
        spread=spread,
        speed=rung.clips_per_s or None if rung is not None else None,
        gflops=record.costs.get("step_gflops", record.costs.get("teacher_gflops")),
        best=best,
        baseline=record.baseline,
        reason=": ".join(part for part in (record.reason, record.message) if part),
        stop_requested=stop_requested and record.state == "running",
        runs=record.runs,
    )


def read_sweep_report(job: Job, root: str) -> dict[str, Any]:
    """Return the report that the sweep wrote when it ended, or an empty dict if there is none yet.

    Computing its intervals and importance requires SciPy and Optuna, which are not installed in the control plane.
    """
    path = join(run_folder(root, job.id), "report", "report.json")
    return dict(read_json(path)) if exists(path) else {}


def current_verdict(report: Mapping[str, Any], sweep: SweepHistory | None) -> str:
    """Return the verdict of the sweep's report or, if there is no report yet, the best trial so far."""
    if report:
        return str(report.get("verdict", ""))
    if sweep is None or not sweep.scored:
        return "No trial has been scored yet."
    best = sweep.best
    ended = sum(one.record.state != "running" for one in sweep.trials)
    failed = sum(one.failed for one in sweep.trials)
    if best is None:
        return "All scored trials have failed so far."
    score = best.rungs[best.reach].score
    parts = [
        f"Best so far: trial {best.number} ({title(best.record.point, dimensions(sweep))}) with {score:.2f} % "
        f"{metric_name(sweep)} at rung {best.reach + 1} of {sweep.levels}.",
        f"{ended} of {sweep.config.budget.trials} trials have ended"
        + (f", {failed} of them failed." if failed else "."),
    ]
    base = sweep.baseline
    if base is not None and base is not best and best.reach in base.rungs:
        gain = score - base.rungs[best.reach].score
        parts.append(
            f"The base config scored {gain:.2f} points lower; the final verdict tests whether that is significant."
        )
    return " ".join(parts)


def current_importance(report: Mapping[str, Any], sweep: SweepHistory) -> ImportanceView:
    """Return the importance that the sweep's report contains, or the reason why there is none."""
    if not report:
        return ImportanceView([], "The importance of the settings is estimated when the sweep ends.")
    if not report.get("importance"):
        return ImportanceView([], NO_IMPORTANCE)
    found = Importance.model_validate(report["importance"])
    names = dimensions(sweep)
    guide = f", a rough guide below {RELIABLE_TRIALS} trials" if found.trials < RELIABLE_TRIALS else ""
    note = (
        f"Share of the score's variance that each setting explains (fANOVA), estimated from {found.trials} trials at "
        f"rung {found.level + 1}{guide}. It says nothing about values that were not tried."
    )
    return ImportanceView([(names.get(name, name), share) for name, share in found.shares.items()], note)


def baseline_differences(report: Mapping[str, Any]) -> dict[int, BaselineDifference]:
    """Return the differences from the base config by trial number, or an empty dict if the report contains none."""
    rows = [TrialRow.model_validate(row) for row in report.get("rows", ())]
    if all(row.difference is None for row in rows):
        return {}
    return {row.number: BaselineDifference(row.difference, baseline_difference(row)) for row in rows}


def metric_name(sweep: SweepHistory) -> str:
    """Return the name of the metric that the sweep maximises."""
    return METRIC_NAMES.get(sweep.config.metric, sweep.config.metric)


def score_map(sweep: SweepHistory) -> RatioMap | None:
    """Return the scores by mask ratio, or None if no trial has been scored or the ratios do not vary."""
    return ratio_map(sweep, sweep.top_level) if sweep.scored else None


def trained_clips(sweep: SweepHistory) -> int:
    """Return the total number of clips that the trials have trained on."""
    return sum(rung.clips for trial in sweep.trials for rung in list(trial.record.rungs)[-1:])
