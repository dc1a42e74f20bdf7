"""Render a sweep's report as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tune_spaces.report.figures import Report, TrialRow
from tune_spaces.report.formatting import share, signed, spread
from tune_spaces.report.sweep import SweepHistory
from tune_spaces.report.verdict import METRIC_NAMES

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

METRIC_DESCRIPTIONS = {
    "eval/knn_top1": "percentage of held-out samples classified correctly by their nearest labelled samples in the "
    "space of the student's frozen features; no training involved",
    "eval/knn_centred_top1": "percentage of held-out samples classified correctly by their nearest labelled samples in "
    "the space of the student's frozen, mean-centred features; no training involved",
    "eval/top1": "percentage of held-out samples classified correctly by a linear classifier trained on the student's "
    "frozen features",
}
WHY_PROBES = (
    "Losses at different mask ratios cannot be compared, because hiding more or less changes the task; the sweep "
    "therefore maximises a probe on held-out data."
)


class PagePicture(NamedTuple):
    """A plot shown in report.md."""

    file: str
    title: str
    caption: str


COLUMNS: dict[str, Callable[[TrialRow], str]] = {
    "trial": lambda row: str(row.number),
    "point": lambda row: row.title,
    "parent": lambda row: "–" if row.parent is None else str(row.parent),
    "rung": lambda row: "–" if row.rung is None else f"{row.rung}",
    "score %": lambda row: spread(row.by_seed),
    "to baseline": lambda row: baseline_difference(row),
    "clips/s": lambda row: "–" if row.clips_per_s is None else f"{row.clips_per_s:.3g}",
    "teacher GFLOP": lambda row: "–" if row.teacher_gflops is None else f"{row.teacher_gflops:.3g}",
    "state": lambda row: _state(row),
}

IN_PAGE_ONLY = ("clips/s", "teacher GFLOP")


def baseline_difference(row: TrialRow) -> str:
    """Return a trial's difference from the baseline in points, with its 95 % interval if there are several seeds."""
    if row.baseline:
        return "baseline"
    if row.difference is None:
        return "–"
    text = signed(row.difference)
    if row.interval is not None:
        text += f" [{signed(row.interval[0])}, {signed(row.interval[1])}]"
    return text if row.difference_rung == row.rung else f"{text} at rung {row.difference_rung}"


def _state(row: TrialRow) -> str:
    marks = ["best"] if row.best else []
    return ", ".join([*marks, row.state])


def headings(report: Report) -> list[str]:
    """Return the names of the non-empty columns."""
    return [name for name, cell in COLUMNS.items() if any(cell(row) != "–" for row in report.rows)]


def _title(report: Report) -> str:
    seeds = max((len(row.by_seed) for row in report.rows), default=1)
    over = f", mean ± sd of {seeds} seeds" if seeds > 1 else ""
    return f"{METRIC_NAMES.get(report.metric, report.metric)}{over}"


def table(report: Report) -> Table:
    """Return a table of all trials that fits 80 columns; report.md adds speed and cost."""
    from rich.box import SIMPLE
    from rich.table import Table

    shown = Table(title=f"Trials by {_title(report)}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    names = [name for name in headings(report) if name not in IN_PAGE_ONLY]
    for name in names:
        left = name in ("point", "state")
        shown.add_column(name, justify="left" if left else "right", no_wrap=name != "point")
    previous: bool | None = None
    for row in report.rows:
        if previous is not None and previous != row.compared:
            shown.add_section()  # trials below the line are not comparable with those above it
        previous = row.compared
        style = "bold green" if row.best else "cyan" if row.baseline else None if row.compared else "dim"
        shown.add_row(*(_plain(COLUMNS[name](row)) for name in names), style=style)
    return shown


def show(report: Report) -> RenderableType:
    """Render the report for a terminal: verdict, trials, failures and files."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(report.verdict), Text(""), table(report)]
    parts += [
        Text(f"trial {row.number} failed: {_plain(row.reason)}", style="red") for row in report.rows if row.reason
    ]
    parts.append(Text(f"{report.folder}: {', '.join(report.files)}", style="dim"))
    return Group(*parts)


def markdown(report: Report, sweep: SweepHistory, pictures: Sequence[PagePicture]) -> str:
    """Return the text of report.md, which refers to plots in the same folder."""
    config = sweep.config
    space = f"study {config.space.study}" if config.space.study else ", ".join(
        [*config.space.use, *config.space.dimensions]
    )  # fmt: skip
    fractions = ", ".join(share(fraction) for fraction in config.fractions())
    how = f"Space: {space}. Algorithm: {config.algorithm}; stopping: {config.stopping}; "
    how += f"{config.seeds} {'seed' if config.seeds == 1 else 'seeds'} per trial; "
    how += f"probed after {fractions} of a trial's length (rungs 1 to {report.rungs})." if report.rungs > 1 else (
        "probed at the end of each trial."
    )  # fmt: skip
    parts = [
        f"# Sweep {config.name or ''}".rstrip(),
        f"**Verdict.** {report.verdict}",
        how,
        "## Trials",
        _trials(report),
    ]
    if failed := [row for row in report.rows if row.state == "failed"]:
        parts.append(
            "\n".join(f"- Trial {row.number} failed: {_plain(row.reason) or 'no reason given'}" for row in failed)
        )
    for picture in pictures:
        parts += [f"## {picture.title}", f"![{picture.title}]({picture.file})", picture.caption]
    parts += [
        "## Metric",
        f"{METRIC_NAMES[report.metric].capitalize()}: {METRIC_DESCRIPTIONS[report.metric]}. {WHY_PROBES}",
    ]
    parts.append(_caveats(report, sweep))
    if report.best is not None:
        parts += ["## Use", "`best.json` is the complete config of the best trial, at full length:"]
        parts.append("```sh\namd train --config best.json\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _trials(report: Report) -> str:
    names = headings(report)
    lines = ["| " + " | ".join(names) + " |"]
    lines.append("|" + "|".join("---" if name in ("point", "state") else "---:" for name in names) + "|")
    for row in report.rows:
        strong = "**" if row.best else ""
        cells = (_plain(COLUMNS[name](row)).replace("|", "/") for name in names)
        lines.append("| " + " | ".join(f"{strong}{cell}{strong}" for cell in cells) + " |")
    return "\n".join(lines)


def _caveats(report: Report, sweep: SweepHistory) -> str:
    parts = []
    if report.rungs > 1:
        parts.append(
            "Scores at different rungs are not comparable: a trial is compared only with others at the same rung."
        )
    if any(row.interval for row in report.rows):
        parts.append(
            "Intervals are 95 % Student's t intervals of differences paired by seed, each for a single comparison."
        )
    if sweep.config.algorithm == "pbt":
        parts.append(
            "A child continues from its parent's weights with another recipe, so its score reflects its ancestry; "
            "`best.json` is the last recipe of the best trial, and training it from scratch can give a different score."
        )
    if (found := report.importance) is not None:
        parts.append(
            f"Importance is estimated from {found.trials} trials{', a rough guide' if found.trials < 50 else ''}."
        )
    return " ".join(parts)


def _plain(value: str) -> str:
    """Collapse all whitespace, so that the text fits on a single line."""
    return " ".join(value.split())
