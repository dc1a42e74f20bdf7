"""A sweep as pictures: figures of matplotlib, each with the name of its file. One with nothing to show is left out.

Colours are those of Okabe and Ito and of cividis, which colour-blind readers tell apart. Draws without pyplot, so that
nothing outlives a call. Knows nothing of storage.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import stdev
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from tune_spaces.report.figures import (
    Group,
    RatioMap,
    Sweep,
    Trial,
    by_layers,
    by_variant,
    dimensions,
    front,
    importance,
    logarithmic,
    numeric,
    ratio_map,
    share,
    short,
)
from tune_spaces.report.verdict import METRICS

PAPER, INK, FAINT, LINE = "#ffffff", "#212529", "#6c757d", "#dee2e6"
PALE = "#b8bec4"  # trials that ended earlier
BEST, BASELINE, PLAIN = "#d55e00", "#0072b2", "#495057"
SCORES = matplotlib.colormaps["cividis"]
DPI = 150


class Picture(NamedTuple):
    name: str  # of its files, without an ending
    caption: str
    figure: Any


def pictures(sweep: Sweep) -> list[Picture]:
    """All that have something to show, in the order of a page."""
    drawn = ((name, draw(sweep)) for name, draw in DRAWN.items())
    return [Picture(name, CAPTIONS[name], figure) for name, figure in drawn if figure is not None]


def rendered(figure: Any) -> dict[str, bytes]:
    """A figure as files, by ending; equal figures give equal bytes."""
    files = {}
    for ending, options in (("png", {"dpi": DPI}), ("svg", {"metadata": {"Date": None}})):
        data = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "amd"}):
            figure.savefig(data, format=ending, facecolor=PAPER, **options)
        files[ending] = data.getvalue()
    return files


def variants(sweep: Sweep) -> Any:
    """A study's variants, best on top."""
    found = by_variant(sweep)
    return _ranking(sweep, found, f"Study “{sweep.config.space.study}”: what each variant is worth") if found else None


def layers(sweep: Sweep) -> Any:
    found = by_layers(sweep) if sweep.config.space.study is None else []
    return _ranking(sweep, found, "Which aligned layers (student→teacher) serve best") if found else None


def _ranking(sweep: Sweep, found: Sequence[Group], title: str) -> Any:
    """One line a group: mean, sd and a dot for every seed of every trial; a panel where all can be compared, one for
    the furthest rung."""
    levels = _levels(sweep)
    figure, axes = _page(title, 3.0 + 5.0 * len(levels), 2.2 + 0.42 * len(found), len(levels))
    panels = axes if len(levels) > 1 else [axes]
    for number, (panel, level) in enumerate(zip(panels, levels, strict=True)):
        _ranks(panel, sweep, found, level)
        labels = [_cut(group.label, 34) + _trials(len(group.trials)) for group in found]
        panel.set_yticks(range(len(found)), labels if number == 0 else [""] * len(found), fontsize=10)
        panel.set_ylim(len(found) - 0.5, -0.5)
        _metric_axis(panel.xaxis, sweep)
        panel.grid(axis="x", color=LINE, lw=0.7)
        _subtitle(panel, f"{len(sweep.at(level))} trials {sweep.place(level)}")
    keys = [_dot(BEST, _best(sweep), "D"), _dot(PLAIN, "mean ± sd", "D"), _dot(PLAIN, "one seed", "o", hollow=True)]
    if sweep.baseline in sweep.alive and sweep.baseline is not sweep.best:
        keys.insert(1, _dot(BASELINE, "baseline", "D", line=(0, (4, 3))))
    _legend(figure, keys)
    return figure


def _ranks(axes: Any, sweep: Sweep, found: Sequence[Group], level: int) -> None:
    best, base = sweep.best, sweep.baseline
    for at, group in enumerate(found):
        there = group.at(level)
        if not there:
            axes.annotate(
                f"came to rung {group.reach + 1}", (0.02, at), xycoords=("axes fraction", "data"), va="center",
                fontsize=9, color=FAINT,
            )  # fmt: skip
            continue
        colour = BEST if best in there else BASELINE if base in there else PLAIN
        values = [value for trial in there for value in sweep.seeds(trial.rungs[level])]
        middle = group.score(level)
        if len(values) > 1:
            sd = stdev(values)
            axes.plot([middle - sd, middle + sd], [at, at], color=colour, lw=2.2, solid_capstyle="butt", zorder=1)
            axes.plot(values, [at] * len(values), "o", ms=4.5, mfc=PAPER, mec=colour, zorder=3)
        axes.plot([middle], [at], "D", ms=7.5, color=colour, zorder=2)
    if base in sweep.at(level) and base is not None:
        axes.axvline(base.rungs[level].score, color=BASELINE, lw=1, ls=(0, (4, 3)), zorder=0)
    axes.margins(x=0.08)


def _levels(sweep: Sweep) -> list[int]:
    """Where most can be compared, and the furthest."""
    return sorted({sweep.fullest, sweep.top}) if len(sweep.compared) < len(sweep.alive) else [sweep.top]


def _trials(number: int) -> str:
    return f" ({number} trials)" if number > 1 else ""


def ratios(sweep: Sweep) -> Any:
    """Scores over teacher and student ratio: where all can be compared, and as far as each has come."""
    if sweep.config.space.study is not None:
        return None
    maps = [(level, found) for level in _levels(sweep) if (found := ratio_map(sweep, level)) is not None]
    if not maps:
        return None
    columns, lines = len(maps[0][1].students), len(maps[0][1].teachers)
    wide, high = max(4.6, 0.92 * columns + 1.5), max(3.2, 0.74 * lines + 2.2)
    figure, panels = _page("How much teacher and student see: quality by mask ratio", wide * len(maps), high, len(maps))
    # one span of colours for all panels: small differences between the last few would look large otherwise
    span = max(max(scores) - min(scores) for level, found in maps if (scores := _reached(found, level)))
    for number, (axes, (level, found)) in enumerate(zip(panels if len(maps) > 1 else [panels], maps, strict=True)):
        _map(figure, axes, sweep, found, level, span, number == 0)
    keys = [
        Patch(facecolor="none", edgecolor=BEST, lw=2.6, label="best"),
        Patch(facecolor="none", edgecolor=BASELINE, lw=2.6, label="baseline: what the sweep started from"),
    ]
    if any(cell.symmetric for _, found in maps for cell in found.cells):
        keys.append(
            Patch(facecolor="none", edgecolor=INK, lw=1.2, ls=(0, (3, 2)), label="symmetric: both see the same")
        )
    if any(cell.level < level for level, found in maps for cell in found.cells):
        keys.append(Patch(facecolor="#f1f3f5", edgecolor=PALE, hatch="///", label="came only to the rung named"))
    _legend(figure, keys)
    return figure


def _map(figure: Any, axes: Any, sweep: Sweep, found: RatioMap, level: int, span: float, first: bool) -> None:
    high = max(_reached(found, level), default=1.0)
    norm = matplotlib.colors.Normalize(high - 1.02 * span - 1e-6, high + 1e-6)
    filled = {(cell.student, cell.teacher) for cell in found.cells}
    for column, line in found.possible - filled:
        axes.add_patch(Rectangle((column - 0.5, line - 0.5), 1, 1, fc="none", ec=LINE, lw=0.8))
    for cell in found.cells:
        corner, reached = (cell.student - 0.5, cell.teacher - 0.5), cell.level == level
        colour: Any = SCORES(norm(cell.score)) if reached else "#f1f3f5"
        axes.add_patch(
            Rectangle(corner, 1, 1, fc=colour, ec=PAPER if reached else PALE, lw=1, hatch=None if reached else "///")
        )
        ink = INK if not reached or _light(colour) else PAPER
        text = [f"{cell.score:.1f}"]
        text += [f"± {cell.sd:.1f}"] if cell.sd is not None else []
        text += [f"rung {cell.level + 1}"] if not reached else []
        text += [f"{len(cell.trials)} trials"] if reached and len(cell.trials) > 1 else []
        if cell.symmetric:
            _frame(axes, cell.student, cell.teacher, ink if reached else FAINT, 1.3, 0.44, (0, (3, 2)))
        box = None if reached else {"facecolor": "#f1f3f5", "edgecolor": "none", "pad": 1.2}
        axes.text(
            cell.student, cell.teacher, "\n".join(text), ha="center", va="center", fontsize=8.5, linespacing=1.15,
            color=ink if reached else FAINT, bbox=box, zorder=3,
        )  # fmt: skip
    marked = [(sweep.baseline, BASELINE, 0.46), (sweep.best, BEST, 0.40)]
    same = sweep.baseline is sweep.best
    for trial, colour, half in marked:
        for cell in found.cells:
            if trial is not None and trial.number in cell.trials:
                _frame(axes, cell.student, cell.teacher, colour, 2.6, half if same or half == 0.46 else 0.46)
    axes.set_xlim(-0.55, len(found.students) - 0.45)
    axes.set_ylim(-0.55, len(found.teachers) - 0.45)
    axes.set_xticks(range(len(found.students)), found.students, fontsize=9)
    teachers = [f"{label}\nfull view" if label in ("0", "0.0") else label for label in found.teachers]
    axes.set_yticks(range(len(found.teachers)), teachers, fontsize=9)
    axes.set_xlabel("student ratio (hidden from the student)", color=INK)
    axes.set_ylabel("teacher ratio (hidden from the teacher)" if first else "", color=INK)
    axes.tick_params(length=0)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    if level == sweep.top and len(sweep.compared) == len(sweep.alive):
        where = f"all {len(sweep.alive)} trials {sweep.place(level)}" if len(sweep.alive) > 1 else sweep.place(level)
    elif level == sweep.fullest and level != sweep.top:
        where = f"rung {level + 1}, {sweep.place(level)}: {len(sweep.at(level))} trials compared"
    else:
        where = f"rung {level + 1}, {sweep.place(level)}: {len(sweep.at(level))} of {len(sweep.alive)} trials"
    _subtitle(axes, where)
    if span and len(_reached(found, level)) > 1:
        bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, SCORES), ax=axes, shrink=0.8, pad=0.02, aspect=24)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=0, colors=FAINT)
        bar.set_label(f"{METRICS[sweep.config.metric]}, %", fontsize=8.5, color=FAINT)


def _reached(found: RatioMap, level: int) -> list[float]:
    return [cell.score for cell in found.cells if cell.level == level]


def _frame(axes: Any, column: int, line: int, colour: str, width: float, half: float, style: Any = "-") -> None:
    axes.add_patch(
        Rectangle(
            (column - half, line - half), 2 * half, 2 * half, fc="none", ec=colour, lw=width, ls=style, zorder=4,
            joinstyle="miter",
        )
    )  # fmt: skip


def cost(sweep: Sweep) -> Any:
    """Score against measured speed, and against the teacher's work: what no other trial beats is joined."""
    trials, level = sweep.compared, sweep.top
    timed = [trial for trial in trials if trial.rungs[level].clips_per_s]
    counted = [trial for trial in trials if "teacher_gflops" in trial.record.costs]
    panels: list[tuple[list[Trial], Callable[[Trial], float], str, int]] = []
    if len(timed) > 1:
        panels.append((timed, lambda trial: trial.rungs[level].clips_per_s, "clips a second, measured in training", 1))
    if len({trial.record.costs["teacher_gflops"] for trial in counted}) > 1:
        panels.append((counted, lambda trial: trial.record.costs["teacher_gflops"], "teacher's GFLOP a clip", -1))
    if not panels:
        return None
    figure, found = _page("Quality against the cost of the teacher", 6.2 * len(panels), 4.9, len(panels))
    for number, (axes, (shown, x, label, sign)) in enumerate(
        zip(found if len(panels) > 1 else [found], panels, strict=True)
    ):
        _cost_panel(axes, sweep, shown, x, label, sign)
        axes.set_ylabel("" if number else f"{METRICS[sweep.config.metric]}, %")
    keys = [_dot(BEST, _best(sweep)), _dot(PLAIN, "other trials, by number")]
    if sweep.baseline in trials and sweep.baseline is not sweep.best:
        keys.insert(1, _dot(BASELINE, "baseline"))
    keys.append(Line2D([], [], color=INK, lw=1.2, label="Pareto front: no trial is better and cheaper"))
    if any(len(sweep.seeds(trial.rungs[level])) > 1 for trial in trials):
        keys.append(Line2D([], [], color=PALE, lw=1.2, label="± sd over seeds"))
    _legend(figure, keys)
    for axes, (shown, x, _, sign) in zip(found if len(panels) > 1 else [found], panels, strict=True):
        points = [(sign * x(trial), trial.rungs[level].score) for trial in shown]
        first = {shown[at].number for at in front(points)}
        line = [(sign * a, b) for a, b in sorted(points[at] for at in front(points))]
        wanted = sorted(shown, key=lambda trial: (trial is not sweep.best, trial is not sweep.baseline,
                                                  trial.number not in first))  # fmt: skip
        _name_points(figure, axes, [(x(trial), trial.rungs[level].score, str(trial.number)) for trial in wanted], line)
    return figure


def _cost_panel(
    axes: Any, sweep: Sweep, shown: list[Trial], x: Callable[[Trial], float], label: str, sign: int
) -> None:
    level = sweep.top
    points = [(sign * x(trial), trial.rungs[level].score) for trial in shown]
    best = sorted(points[at] for at in front(points))
    axes.plot([sign * a for a, _ in best], [b for _, b in best], color=INK, lw=1.2, zorder=2)
    for trial, (a, b) in zip(shown, points, strict=True):
        colour = BEST if trial is sweep.best else BASELINE if trial is sweep.baseline else PLAIN
        values = sweep.seeds(trial.rungs[level])
        if len(values) > 1:
            sd = stdev(values)
            axes.plot([sign * a] * 2, [b - sd, b + sd], color=PALE, lw=1.2, zorder=1)
        size = 9 if colour != PLAIN else 6.5
        axes.plot([sign * a], [b], "o", ms=size, color=colour, mec=PAPER, mew=0.8, zorder=4 if colour != PLAIN else 3)
    axes.set_xlabel(label + (" (faster to the right)" if sign > 0 else " (cheaper to the left)"), color=INK)
    axes.grid(color=LINE, lw=0.7)
    axes.margins(0.08, 0.1)
    left = len(sweep.alive) - len(shown)
    more = f"; {left} that ended earlier are not shown" if left else ""
    _subtitle(axes, f"{len(shown)} trials {sweep.place(level)}{more}")


def _name_points(
    figure: Any, axes: Any, named: Sequence[tuple[float, float, str]], line: Sequence[tuple[float, float]]
) -> None:
    """A label beside each point where there is room, clear of a line; the first ones choose first."""
    figure.draw_without_rendering()
    frame, taken = axes.get_window_extent(), list[Any]()
    dots = [axes.transData.transform((x, y)) for x, y, _ in named]
    for start, end in itertools.pairwise([axes.transData.transform(point) for point in line]):
        steps = max(2, int(math.dist(start, end) / 3))
        dots += [start + (end - start) * step / steps for step in range(steps)]
    places = [
        (7, 5, "left"),
        (-7, 5, "right"),
        (7, -13, "left"),
        (-7, -13, "right"),
        (0, 9, "center"),
        (0, -18, "center"),
    ]
    for x, y, text in named:
        for dx, dy, side in places:
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=side, fontsize=8.5, color=INK, zorder=5
            )
            box = note.get_window_extent().padded(1)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*at) for at in dots):
                taken.append(box)
                break
            note.remove()


def parallel(sweep: Sweep) -> Any:
    """A line through the choices of each trial, coloured by its score where most can be compared."""
    names = {} if sweep.config.space.study is not None else dimensions(sweep)
    trials = sweep.alive
    columns = {name: [trial.record.point[name] for trial in trials if name in trial.record.point] for name in names}
    columns = {name: column for name, column in columns.items() if len({repr(value) for value in column}) > 1}
    level = sweep.fullest
    if len(columns) < 2 or len(sweep.at(level)) < 2:
        return None
    figure, axes = _page("Which choices go with which score", max(8.2, 2.1 * (len(columns) + 1) + 1), 5.0)
    scales = [_scale(sweep, name, column) for name, column in columns.items()]
    scores = [trial.rungs[level].score for trial in sweep.at(level)]
    low, high = min(scores), max(scores)
    norm = matplotlib.colors.Normalize(low, high if high > low else low + 1)
    last = len(scales)
    special = [trial for trial in (sweep.baseline, sweep.best) if trial is not None]
    for trial in sorted(trials, key=lambda trial: (trial in special, _score(trial, level))):
        compared = level in trial.rungs
        places = [
            (at, scale.place(trial.record.point[name]))
            for at, (name, scale) in enumerate(zip(columns, scales, strict=True))
            if name in trial.record.point
        ]
        colour: Any = PALE
        if compared:
            places.append((last, float(norm(trial.rungs[level].score))))
            colour = SCORES(norm(trial.rungs[level].score))
        style: dict[str, Any] = {"color": colour, "lw": 1.6 if compared else 0.9, "alpha": 0.9}
        if trial is sweep.best:
            style = {"color": BEST, "lw": 3.2}
        elif trial is sweep.baseline:
            style = {"color": BASELINE, "lw": 2.4, "ls": (0, (4, 2))}
        axes.plot(*_eased(places), zorder=2 + compared + (trial in special), solid_capstyle="round", **style)
    for at in range(last + 1):
        axes.axvline(at, color=INK, lw=1, zorder=1)
    for at, scale in enumerate(scales):
        for place, text in scale.ticks:
            _tick(axes, at, place, text, 5 if at else -5)
    if high > low:
        axes.imshow(
            [[step / 99] for step in range(100)], aspect="auto", origin="lower", cmap=SCORES, zorder=4,
            extent=(last - 0.012 * (last + 1), last + 0.012 * (last + 1), 0, 1),
        )  # fmt: skip
        for value in MaxNLocator(5).tick_values(low, high):
            if low <= value <= high:
                _tick(axes, last, float(norm(value)), f"{value:g}", 10)
    else:
        _tick(axes, last, float(norm(low)), f"{low:.1f}", 10)
    heads = [_cut(names[name], 24).replace("_", " ") for name in columns]
    axes.set_xticks(range(last + 1), [*heads, f"score, %, of {len(scores)} trials\n{sweep.place(level)}"], fontsize=10)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=8)
    axes.set_yticks([])
    axes.set_xlim(-0.05, last + 0.3)
    axes.set_ylim(-0.04, 1.04)
    for side in axes.spines.values():
        side.set_visible(False)
    keys = [Line2D([], [], color=BEST, lw=3.2, label=f"{_best(sweep)} {sweep.place(sweep.top)}")]
    if sweep.baseline in trials and sweep.baseline is not sweep.best:
        keys.append(Line2D([], [], color=BASELINE, lw=2.4, ls=(0, (4, 2)), label="baseline"))
    keys.append(Line2D([], [], color=SCORES(0.6), lw=2.2, label=f"{METRICS[sweep.config.metric]}, as on the right"))
    if len(scores) < len(trials):
        keys.append(Line2D([], [], color=PALE, lw=1, label="not scored there"))
    _legend(figure, keys)
    return figure


def _score(trial: Trial, level: int) -> float:
    return trial.rungs[level].score if level in trial.rungs else float("-inf")


class _Scale(NamedTuple):
    place: Callable[[Any], float]  # a value's height, 0 to 1
    ticks: list[tuple[float, str]]


def _scale(sweep: Sweep, name: str, column: Sequence[Any]) -> _Scale:
    """Few values evenly spaced, in order; many numbers on a line, by logarithm where they span orders."""
    if numeric(column) and len(set(column)) > 8:
        low, high = min(column), max(column)
        if logarithmic(sweep, name, column):

            def place(value: Any) -> float:
                return math.log(value / low) / math.log(high / low)

            marks = [low * (high / low) ** (step / 4) for step in range(5)]
            return _Scale(place, [(step / 4, f"{mark:.2g}") for step, mark in enumerate(marks)])
        marks = [mark for mark in MaxNLocator(5).tick_values(low, high) if low <= mark <= high]
        return _Scale(
            lambda value: float((value - low) / (high - low)), [((m - low) / (high - low), f"{m:g}") for m in marks]
        )
    distinct = sorted(set(column)) if numeric(column) else sorted({short(value) for value in column})
    heights = {short(value): at / (len(distinct) - 1) for at, value in enumerate(distinct)}
    every = -(-len(heights) // 12)
    ticks = [(height, _cut(text, 22)) for at, (text, height) in enumerate(heights.items()) if at % every == 0]
    return _Scale(lambda value: heights[short(value)], ticks)


def _eased(places: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """A curve through places that is level at each of them, so that lines which meet there stay apart by eye."""
    xs, ys = [float(places[0][0])], [places[0][1]]
    for (x0, y0), (x1, y1) in itertools.pairwise(places):
        for step in range(1, 25):
            u = step / 24
            xs.append(x0 + u * (x1 - x0))
            ys.append(y0 + (3 * u * u - 2 * u**3) * (y1 - y0))
    return xs, ys


def _tick(axes: Any, x: float, y: float, text: str, away: int = 4) -> None:
    axes.annotate(
        text, (x, y), (away, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK, zorder=9,
        ha="left" if away > 0 else "right",
        bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}, annotation_clip=False,
    )  # fmt: skip


def importances(sweep: Sweep) -> Any:
    found = importance(sweep) if sweep.config.space.study is None else None
    if found is None:
        return None
    names = dimensions(sweep)
    figure, axes = _page("What the score depends on", 7.0, 1.7 + 0.42 * len(found.shares))
    for at, part in enumerate(found.shares.values()):
        axes.barh(at, 100 * part, height=0.62, color=BASELINE)
        axes.annotate(
            f"{100 * part:.0f} %", (100 * part, at), (5, 0), textcoords="offset points", va="center", fontsize=9.5
        )
    axes.set_yticks(range(len(found.shares)), [_cut(names[name], 30).replace("_", " ") for name in found.shares])
    axes.set_ylim(len(found.shares) - 0.4, -0.6)
    axes.set_xlim(0, 112 * max(found.shares.values()))
    axes.set_xlabel("share of the score's variance between trials (fANOVA)", color=INK)
    axes.grid(axis="x", color=LINE, lw=0.7)
    few = "; few trials: take it as a hint" if found.trials < 50 else ""
    _subtitle(axes, f"{found.trials} trials {sweep.place(found.level)}{few}")
    return figure


def curves(sweep: Sweep) -> Any:
    """The score of each trial as it was trained."""
    if max((len(trial.rungs) for trial in sweep.trials), default=0) < 2:
        return None
    figure, axes = _page("How scores grew: every trial at its rungs", 8.2, 5.0)
    fractions = sweep.config.fractions()
    special = {trial.number for trial in (sweep.best, sweep.baseline) if trial is not None}
    scored = [trial for trial in sweep.trials if trial.rungs]
    for trial in sorted(scored, key=lambda trial: (trial.number in special, trial.reach)):
        levels = sorted(trial.rungs)
        xs, ys = [fractions[level] for level in levels], [trial.rungs[level].score for level in levels]
        style = _fate(sweep, trial)
        if fork := _fork(sweep, trial):  # the line leaves its parent's
            axes.plot([fork[0], xs[0]], [fork[1], ys[0]], **{**style, "marker": "", "ls": (0, (1, 1.5))})
        if trial.number in special and all(len(sweep.seeds(trial.rungs[level])) > 1 for level in levels):
            sds = [stdev(sweep.seeds(trial.rungs[level])) for level in levels]
            low, high = [y - sd for y, sd in zip(ys, sds, strict=True)], [y + sd for y, sd in zip(ys, sds, strict=True)]
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.13, lw=0, zorder=1)
        axes.plot(xs, ys, **style)
    if sweep.config.algorithm == "pbt":
        axes.set_xlim(0, 1.04)
    else:
        axes.set_xscale("log")
        axes.set_xlim(fractions[0] * 0.9, 1.12)
    axes.xaxis.set_major_locator(FixedLocator(list(fractions)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(fractions, [share(fraction) if fraction < 1 else "whole" for fraction in fractions])
    axes.set_xlabel("how much of its length a trial was trained", color=INK)
    _metric_axis(axes.yaxis, sweep)
    axes.grid(color=LINE, lw=0.7)
    band = " (band: ± sd over seeds)" if sweep.config.seeds > 1 else ""
    _subtitle(axes, f"each dot is a rung, where a probe scored the trial{band}")
    keys = [Line2D([], [], label=_best(sweep), **STYLES["best"])] if sweep.best else []
    for fate, label in FATES.items():
        if any(_kind(sweep, trial) == fate for trial in scored):
            keys.append(Line2D([], [], label=label, **STYLES[fate]))
    if any(trial.record.parent is not None for trial in scored):
        keys.append(Line2D([], [], color=PLAIN, lw=1.3, ls=(0, (1, 1.5)), label="a child leaves its parent"))
    _legend(figure, keys)
    return figure


def _fork(sweep: Sweep, trial: Trial) -> tuple[float, float] | None:
    """Where a child left its parent: how far it had come, and its score."""
    if trial.record.parent is None:
        return None
    at, level = sweep.line(trial)[-2], trial.record.born - 1
    return (sweep.config.fractions()[level], at.rungs[level].score) if level in at.rungs else None


STYLES: dict[str, dict[str, Any]] = {
    "best": {"color": BEST, "lw": 2.8, "marker": "o", "ms": 7, "zorder": 6},
    "baseline": {"color": BASELINE, "lw": 2.2, "marker": "o", "ms": 6, "ls": (0, (4, 2)), "zorder": 5},
    "ended": {"color": PLAIN, "lw": 1.3, "marker": "o", "ms": 4.5, "zorder": 4},
    "running": {"color": "#009e73", "lw": 1.3, "marker": "^", "ms": 5.5, "zorder": 4},
    "stopped": {"color": PALE, "lw": 1.0, "marker": "o", "ms": 3.5, "zorder": 2},
    "failed": {"color": PALE, "lw": 1.0, "marker": "x", "ms": 6, "ls": (0, (1, 2)), "zorder": 2},
}
FATES = {
    "baseline": "baseline",
    "ended": "came to its end",
    "running": "not ended yet",
    "stopped": "stopped early",
    "failed": "failed",
}


def _kind(sweep: Sweep, trial: Trial) -> str:
    if trial is sweep.best:
        return "best"
    if trial is sweep.baseline and not trial.failed:
        return "baseline"
    return {"succeeded": "ended"}.get(trial.record.state, trial.record.state)


def _fate(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    return STYLES[_kind(sweep, trial)]


DRAWN: Mapping[str, Callable[[Sweep], Any]] = {
    "variants": variants,
    "mask_ratios": ratios,
    "cost": cost,
    "layers": layers,
    "parallel": parallel,
    "importance": importances,
    "curves": curves,
}
CAPTIONS = {
    "variants": "Each variant's mean, its standard deviation, and every seed.",
    "mask_ratios": "Rows: what is hidden from the teacher; columns: what is hidden from the student. The teacher never "
    "sees less than the student, so one corner stays empty. Hatched: came only to an earlier rung, so it cannot "
    "be compared with the coloured ones. Outlined: possible, but not tried.",
    "cost": "Trials at the same rung only. Speeds are those of training on the machines of this sweep; GFLOP are "
    "counted.",
    "layers": "Blocks count from 1, student→teacher. Trials that share their layer pairs stand in one line. Compare "
    "within a panel only: each is one rung.",
    "parallel": "One line is one trial, coloured at the rung where most trials can be compared; the best is that of "
    "the furthest rung.",
    "importance": "fANOVA on a forest fitted to these trials. It is unreliable for few trials (fewer than about 50), "
    "and says nothing of values that were not tried.",
    "curves": "Scores of the same fraction may be compared, those of different fractions not.",
}


def _page(title: str, width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    room = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
    figure = Figure(figsize=(width, height), layout=room, facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.015, ha="left", fontsize=13.5, fontweight="bold", color=INK)
    axes = figure.subplots(1, panels)
    for one in axes if panels > 1 else [axes]:
        one.set_axisbelow(True)
        one.tick_params(colors=INK, labelsize=9.5)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            one.spines[side].set_color(PALE)
    return figure, axes


def _subtitle(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=FAINT, pad=8)


def _metric_axis(axis: Any, sweep: Sweep) -> None:
    axis.set_label_text(f"{METRICS[sweep.config.metric]}, %", color=INK)


def _legend(figure: Any, keys: Sequence[Any]) -> None:
    wide = figure.get_size_inches()[0]
    letters = sum(len(key.get_label()) + 7 for key in keys)
    lines = max(1, round(letters / (12.5 * wide) + 0.49))
    figure.legend(
        handles=keys, loc="outside lower left", ncols=-(-len(keys) // lines), frameon=False, fontsize=9, labelcolor=INK,
        columnspacing=1.6,
    )  # fmt: skip


def _best(sweep: Sweep) -> str:
    return "best: the baseline" if sweep.best is sweep.baseline else "best"


def _dot(colour: str, label: str, marker: str = "o", *, hollow: bool = False, line: Any = None) -> Any:
    face = PAPER if hollow else colour
    return Line2D([], [], color=colour, marker=marker, mfc=face, ms=7, lw=1 if line else 0, ls=line or "-", label=label)


def _light(colour: tuple[float, float, float, float]) -> bool:
    red, green, blue, _ = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.52


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
