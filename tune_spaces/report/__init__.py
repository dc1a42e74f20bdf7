"""The report of a sweep, made from its config and its ledger alone: a verdict, a table, pictures, the best config.

A sweep that still runs, was stopped, or lost trials has one too. No torch, no Ray.
"""

from __future__ import annotations

from amd.config import with_overrides
from amd.storage import exists, join, remove, write_bytes, write_json
from tune_spaces.report.figures import Report, Row, rows
from tune_spaces.report.page import Shown, markdown, show, table
from tune_spaces.report.sweep import Sweep, read
from tune_spaces.report.verdict import verdict

__all__ = ["REPORT", "Report", "Row", "show", "table", "write_report"]

REPORT = "report"


def write_report(run_folder: str) -> Report:
    """Write `report/` below a sweep's folder: report.md, report.json, best.json, and pictures as PNG and SVG.

    Raises ConfigError for a folder that is no sweep, and for a sweep without a single scored rung.
    """
    from tune_spaces.report.plots import DRAWN, pictures, rendered  # matplotlib: a second, for this call only

    sweep = read(run_folder)
    folder = join(run_folder, REPORT)
    best = _best_config(sweep)
    shown, files = [], []
    for picture in pictures(sweep):
        for ending, data in rendered(picture.figure).items():
            write_bytes(join(folder, f"{picture.name}.{ending}"), data)
            files.append(f"{picture.name}.{ending}")
        shown.append(Shown(f"{picture.name}.png", picture.figure.get_suptitle(), picture.caption))
    if best is not None:
        write_json(join(folder, "best.json"), best)
    made = ["report.md", "report.json", *(["best.json"] if best is not None else []), *files]
    report = Report(
        verdict=verdict(sweep),
        best=sweep.best.number if sweep.best else None,
        metric=sweep.config.metric,
        rungs=sweep.levels,
        rows=rows(sweep),
        folder=folder,
        files=tuple(made),
    )
    write_bytes(join(folder, "report.md"), markdown(report, sweep, shown).encode())
    write_json(join(folder, "report.json"), report.model_dump(mode="json"))
    known = {"best.json", *(f"{name}.{ending}" for name in DRAWN for ending in ("png", "svg"))}
    for stale in known - set(made):  # of an earlier report on the same sweep
        if exists(join(folder, stale)):
            remove(join(folder, stale))
    return report


def _best_config(sweep: Sweep) -> object:
    """The best trial's TrainConfig, complete, under no name: a new run of its own."""
    if sweep.best is None:
        return None
    config = with_overrides(sweep.config.train, {**sweep.best.record.overrides, "name": None})
    return config.model_dump(mode="json")
