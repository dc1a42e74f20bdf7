"""Sweep report, built from a sweep's config and ledger: verdict, table, plots and the best config.

Can be built at any time, including while the sweep is running. Imports neither torch nor Ray.
"""

from __future__ import annotations

from amd.config import with_overrides
from amd.storage import exists, join, remove, write_bytes, write_json
from tune_spaces.report.figures import Report, TrialRow, importance, trial_rows
from tune_spaces.report.page import PagePicture, markdown, show, table
from tune_spaces.report.sweep import SweepHistory, read_sweep
from tune_spaces.report.verdict import verdict

__all__ = ["REPORT", "Report", "TrialRow", "show", "table", "write_report"]

REPORT = "report"


def write_report(run_folder: str) -> Report:
    """Write `report/` in a sweep's folder: report.md, report.json, best.json, and plots as PNG and SVG.

    Raises ConfigError if the folder is not a sweep, or if no trial has been scored yet.
    """
    from tune_spaces.report.plots import DRAWN, pictures, rendered  # imports matplotlib: about a second

    sweep = read_sweep(run_folder)
    folder = join(run_folder, REPORT)
    best = _best_config(sweep)
    page_pictures, files = [], []
    for picture in pictures(sweep):
        for ending, data in rendered(picture.figure).items():
            write_bytes(join(folder, f"{picture.name}.{ending}"), data)
            files.append(f"{picture.name}.{ending}")
        page_pictures.append(PagePicture(f"{picture.name}.png", picture.figure.get_suptitle(), picture.caption))
    if best is not None:
        write_json(join(folder, "best.json"), best)
    written = ["report.md", "report.json", *(["best.json"] if best is not None else []), *files]
    report = Report(
        verdict=verdict(sweep),
        best=sweep.best.number if sweep.best else None,
        metric=sweep.config.metric,
        rungs=sweep.levels,
        rows=trial_rows(sweep),
        importance=importance(sweep) if sweep.config.space.study is None else None,
        folder=folder,
        files=tuple(written),
    )
    write_bytes(join(folder, "report.md"), markdown(report, sweep, page_pictures).encode())
    write_json(join(folder, "report.json"), report.model_dump(mode="json"))
    known = {"best.json", *(f"{name}.{ending}" for name in DRAWN for ending in ("png", "svg"))}
    for stale in known - set(written):  # written by an earlier report of this sweep
        if exists(join(folder, stale)):
            remove(join(folder, stale))
    return report


def _best_config(sweep: SweepHistory) -> object:
    """Return the complete TrainConfig of the best trial, without a name, so that training with it starts a new run."""
    if sweep.best is None:
        return None
    config = with_overrides(sweep.config.train, {**sweep.best.record.overrides, "name": None})
    return config.model_dump(mode="json")
