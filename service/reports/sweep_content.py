"""Content of a sweep's report: verdict, mask ratio map, Pareto front, trials, cost and best trial."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from amd.config import flatten, overridden
from service.db.models import Job
from service.jobs.details.config_diff import ConfigRow, config_rows, preset_values
from service.reports.charts import ChartPoint, ChartSeries, HeatCell, heat_map, line_chart, scatter_plot
from service.reports.sections import ReportChart, preset_command
from service.reports.sweep import (
    TrialPoint,
    current_verdict,
    metric_name,
    ranked,
    read_job_sweep,
    read_sweep_report,
    score_map,
    trained_clips,
    trial_points,
)
from service.web.formats import shortened
from tune_spaces.report.figures import speed_front
from tune_spaces.report.formatting import share
from tune_spaces.report.sweep import SweepHistory

MAX_TRIALS = 200


class SweepContent(NamedTuple):
    """Content that only a sweep's report has."""

    verdict: str
    problem: str
    """Reason why there is nothing to show yet; empty otherwise."""
    setup: list[tuple[str, str]]
    """(name, value) pairs of the sweep's settings."""
    metric: str
    rungs: int
    charts: list[ReportChart]
    trials: list[TrialPoint]
    trials_omitted: int
    ended: int
    """Number of trials that have ended."""
    clips: int
    best: TrialPoint | None
    best_overrides: list[ConfigRow]
    """Config values that the sweep chose for the best trial."""
    best_command: str
    """Command that trains the best trial in full; empty if the job has no preset."""


def read_sweep_content(job: Job, root: str) -> SweepContent:
    """Read a sweep and draw its charts."""
    sweep, problem = read_job_sweep(job, root)
    verdict = current_verdict(read_sweep_report(job, root), sweep)
    if sweep is None:
        return SweepContent(verdict, problem, [], "", 0, [], [], 0, 0, 0, None, [], "")
    trials = ranked(trial_points(sweep))
    shown = trials[:MAX_TRIALS]
    return SweepContent(
        verdict=verdict,
        problem=problem,
        setup=_setup(sweep),
        metric=metric_name(sweep),
        rungs=sweep.levels,
        charts=sweep_charts(sweep, shown),
        trials=shown,
        trials_omitted=len(trials) - len(shown),
        ended=sum(trial.state != "running" for trial in trials),
        clips=trained_clips(sweep),
        best=next((trial for trial in trials if trial.best), None),
        best_overrides=best_overrides(sweep),
        best_command=best_command(job, sweep),
    )


def _setup(sweep: SweepHistory) -> list[tuple[str, str]]:
    config = sweep.config
    space = f"study {config.space.study}" if config.space.study else ", ".join(
        [*config.space.use, *config.space.dimensions]
    )  # fmt: skip
    return [
        ("Metric", metric_name(sweep)),
        ("Space", space),
        ("Algorithm", config.algorithm),
        ("Early stopping", config.stopping),
        ("Rungs", ", ".join(share(fraction) for fraction in config.fractions())),
        ("Seeds per trial", str(config.seeds)),
        ("Training data", config.train.data.train),
    ]


def sweep_charts(sweep: SweepHistory, shown: list[TrialPoint]) -> list[ReportChart]:
    """Draw the non-empty charts of a sweep."""
    charts = [_ratio_chart(sweep), _speed_chart(sweep, shown), _rung_chart(sweep, shown)]
    return [chart for chart in charts if chart.svg]


def _ratio_chart(sweep: SweepHistory) -> ReportChart:
    title, found = "Student × teacher mask ratio", score_map(sweep)
    if found is None:
        return ReportChart(title, Markup(""), [])
    cells = []
    for cell in found.cells:
        is_comparable = cell.level == sweep.top_level
        lines = [f"{cell.score:.1f}", *([f"± {cell.sd:.1f}"] if cell.sd is not None else [])]
        lines += [] if is_comparable else [f"rung {cell.level + 1}"]
        cells.append(HeatCell(cell.student, cell.teacher, cell.score, lines, is_comparable))
    label = f"{metric_name(sweep)} by student and teacher mask ratio; the table has the scores of all trials"
    axes = ("student mask ratio", "teacher mask ratio")
    return ReportChart(title, heat_map(found.students, found.teachers, cells, label, *axes), [])


def _speed_chart(sweep: SweepHistory, shown: list[TrialPoint]) -> ReportChart:
    front = {trial.number for trial in speed_front(sweep)}
    top = sweep.top_level + 1
    points = [
        ChartPoint(f"trial {trial.number}: {trial.title}", trial.speed, trial.score, trial.number in front)
        for trial in shown
        if trial.rung == top and trial.state != "failed" and trial.speed and trial.score is not None
    ]
    label = "Score against training speed; the line is the Pareto front"
    svg = scatter_plot(points, label, "clips per second", shortened(metric_name(sweep), 40))
    return ReportChart("Score against training speed", svg, [])


def _rung_chart(sweep: SweepHistory, shown: list[TrialPoint]) -> ReportChart:
    history = {trial.number: trial for trial in sweep.trials}
    lines = [
        ChartSeries(
            f"trial {trial.number}: {trial.title}",
            [(rung.fraction, rung.score) for _, rung in sorted(history[trial.number].rungs.items())],
            colour=1 if trial.best else 0,
            is_faint=not trial.best,
        )
        for trial in reversed(shown)  # the best trial is drawn last, above the others
    ]
    y_label = shortened(metric_name(sweep), 40)
    svg = line_chart(lines, "Score by rung, one line per trial", "fraction of training", y_label)
    return ReportChart("Score by rung", svg, [])


def best_overrides(sweep: SweepHistory) -> list[ConfigRow]:
    """Return the config values that the sweep chose for its best trial, beside those of the base config."""
    if sweep.best is None:
        return []
    chosen = flatten(sweep.best.record.overrides)
    base = flatten(sweep.config.train.model_dump(mode="json"))
    return [ConfigRow(key, value, base.get(key), base.get(key) != value) for key, value in chosen.items()]


def best_command(job: Job, sweep: SweepHistory) -> str:
    """Return the command that trains the best trial in full; empty if the job has no preset."""
    base = preset_values("train", job.preset)
    if sweep.best is None or job.preset is None or base is None:
        return ""
    config = overridden(sweep.config.train.model_dump(mode="json"), sweep.best.record.overrides)
    return preset_command("train", job.preset, [row for row in config_rows(config, base) if row.changed])
