"""A sweep's verdict in plain words: which point is best, by how much, and whether that is a difference.

Claims no more than the seeds carry: an interval only where there are several, a difference only where it holds for as
many comparisons as were made.
"""

from __future__ import annotations

from statistics import mean
from typing import Literal

from tune_spaces.report.figures import CONFIDENCE, Difference, fastest, to_baseline
from tune_spaces.report.formatting import signed, spread, title
from tune_spaces.report.sweep import Sweep, Trial, dimensions

METRICS = {
    "eval/knn_top1": "nearest-neighbour top-1",
    "eval/knn_centred_top1": "centred nearest-neighbour top-1",
    "eval/top1": "linear-probe top-1",
}

Judgement = Literal["better", "worse", "maybe", "alike", "unknown"]
ONE_SEED = "one seed: no interval, repeat with seeds=3"


def judge(sweep: Sweep, trial: Trial) -> Judgement:
    """Whether a trial differs from the baseline. maybe: by itself, but not among as many comparisons as were made."""
    _, found = to_baseline(sweep, trial)
    if found is None or found.interval is None:
        return "unknown"
    if not _clear(found):
        return "alike"
    # Bonferroni: with k comparisons each interval is that of 1 - 0.05/k.
    _, strict = to_baseline(sweep, trial, 1 - (1 - CONFIDENCE) / comparisons(sweep))
    if strict is None or not _clear(strict):
        return "maybe"
    return "better" if found.value > 0 else "worse"


def comparisons(sweep: Sweep) -> int:
    """Scored trials besides the baseline: each was a chance to look better."""
    return max(1, len(sweep.alive) - sum(trial is sweep.baseline for trial in sweep.alive))


def _clear(found: Difference) -> bool:
    assert found.interval is not None
    low, high = found.interval
    return low > 0 or high < 0


def verdict(sweep: Sweep) -> str:
    """One paragraph."""
    best = sweep.best
    if best is None:
        return " ".join(["All trials that were scored failed: there is no best.", *_rest(sweep)])
    parts = [_best(sweep, best)]
    if sweep.config.space.study is not None:
        parts += [*_variants(sweep), *_chosen(sweep)]
    else:
        parts += [_against_baseline(sweep, best), *_chosen(sweep)]
    return " ".join(part for part in [*parts, *_costs(sweep, best), *_rest(sweep)] if part)


def name(sweep: Sweep, trial: Trial) -> str:
    return f"trial {trial.number} ({title(trial.record.point, dimensions(sweep))})"


def _best(sweep: Sweep, best: Trial) -> str:
    values = sweep.seeds(best.rungs[sweep.top])
    seeds = f" (mean ± sd of {len(values)} seeds)" if len(values) > 1 else " (one seed)"
    compared = len(sweep.compared)
    if sweep.top == sweep.levels - 1:
        among = (
            f"Best of {compared} trials that came to their end"
            if compared > 1
            else "The only trial that came to its end"
        )
    else:
        among = f"best of {compared} compared" if compared > 1 else "the only one"
        among = f"No trial has come to its end; {among} at rung {sweep.top + 1} of {sweep.levels}, "
        among += sweep.place(sweep.top)
    line = [trial.number for trial in sweep.line(best)[:-1]]
    weights = f" Its weights come from trial {', then '.join(map(str, line))}." if line else ""
    return f"{among}: {name(sweep, best)} with {spread(values)} % {METRICS[sweep.config.metric]}{seeds}.{weights}"


def _against_baseline(sweep: Sweep, best: Trial) -> str:
    base = sweep.baseline
    if base is None:
        return "No trial of this sweep is the config it started from, so nothing can be said of a gain."
    if base.failed:
        return f"The baseline, trial {base.number}, failed, so nothing can be said of a gain."
    if not base.rungs:
        return f"The baseline, trial {base.number}, has not been scored yet."
    if best is base:
        second = next((trial for trial in sweep.compared if trial is not base), None)
        if second is None:
            return "It is the baseline, the config that the sweep started from."
        level, found = to_baseline(sweep, second)
        assert found is not None
        by = f"the next, {name(sweep, second)}, is {-found.value:.1f} points behind"
        return f"It is the baseline, the config that the sweep started from; {by}{_interval(found, -1)}."
    level, found = to_baseline(sweep, best)
    if found is None:
        return f"It shares no rung with the baseline, trial {base.number}, so the two cannot be compared."
    text = f"Against the baseline (trial {base.number}, {spread(sweep.seeds(base.rungs[level]))} %) "
    if level < sweep.top:
        where = f"rung {level + 1} of {sweep.levels}, {sweep.place(level)}"
        text = f"The baseline, trial {base.number}, came only to {where}, and only there are they compared: "
        text += f"{spread(sweep.seeds(best.rungs[level]))} % against {spread(sweep.seeds(base.rungs[level]))} %, "
    text += f"that is {signed(found.value)} points{_interval(found)}"
    return (
        text
        + {
            "better": ": a difference, also when all comparisons of this sweep are allowed for.",
            "worse": ": worse there, also when all comparisons of this sweep are allowed for.",
            "maybe": f": more than seeds explain in a single comparison, but not among the {comparisons(sweep)} made "
            "here; repeat both with fresh seeds.",
            "alike": ": the seeds do not tell the two apart.",
            "unknown": f" ({_no_interval(sweep, best, level)}).",
        }[judge(sweep, best)]
    )


def _no_interval(sweep: Sweep, trial: Trial, level: int) -> str:
    base = sweep.baseline
    ours = len(sweep.seeds(trial.rungs[level]))
    theirs = len(sweep.seeds(base.rungs[level])) if base else 0
    if ours == theirs == 1:
        return ONE_SEED if sweep.config.algorithm != "pbt" else "one line each: no interval, repeat with another seed"
    return f"no interval: {ours} and {theirs} seeds cannot be paired"


def _interval(found: Difference, sign: int = 1) -> str:
    if found.interval is None:
        return ""
    low, high = sorted(sign * end for end in found.interval)
    return f", 95 % interval {signed(low)} to {signed(high)} (paired by seed)"


def _chosen(sweep: Sweep) -> list[str]:
    scored = len(sweep.alive)
    if scored < 2:
        return []
    return [
        f"The best of {scored} is chosen by its own score and so flattered: expect less of it on new data and seeds."
    ]


def _variants(sweep: Sweep) -> list[str]:
    base = sweep.baseline
    others = [trial for trial in sweep.alive if trial is not base]
    if base is None or base.failed or not base.rungs:
        return ["The baseline has no score, so the variants are not compared with it."]
    words = {
        "better": "better",
        "worse": "worse",
        "maybe": "perhaps different",
        "alike": "not told apart",
        "unknown": "",
    }
    told = []
    for trial in sorted(others, key=lambda trial: -mean(sweep.seeds(trial.rungs[trial.reach]))):
        level, found = to_baseline(sweep, trial)
        if found is None:
            told.append(f"{title(trial.record.point, {})} shares no rung with it")
            continue
        where = f" at rung {level + 1}" if level < sweep.top else ""
        reach = f" ({signed(found.interval[0])} to {signed(found.interval[1])})" if found.interval else ""
        word = words[judge(sweep, trial)]
        told.append(
            f"{title(trial.record.point, {})} {signed(found.value)}{reach}{where}" + (f" {word}" if word else "")
        )
    if not told:
        return ["There is nothing to compare it with yet."]
    seeds = len(sweep.seeds(base.rungs[base.reach]))
    how = "points, with 95 % intervals paired by seed" if seeds > 1 else f"points; {ONE_SEED}"
    text = f"Against {title(base.record.point, {})}, the baseline, in {how}: {'; '.join(told)}."
    count = comparisons(sweep)
    if seeds > 1 and count > 1:
        text += f" Better and worse are said only of differences that also hold among {count} comparisons."
    return [text]


def _costs(sweep: Sweep, best: Trial) -> list[str]:
    if sweep.config.against is None or len(sweep.compared) < 2:
        return []
    others = [trial.number for trial in fastest(sweep) if trial is not best]
    listed = ", ".join(str(number) for number in sorted(others))
    return [f"Two objectives were searched; by score and measured speed trials {listed} are not beaten either."] * bool(
        others
    )


def _rest(sweep: Sweep) -> list[str]:
    """What became of the others."""
    count = {state: sum(trial.record.state == state for trial in sweep.trials) for state in ("running", "failed")}
    early = sum(trial.record.state == "stopped" and trial.reach < sweep.top for trial in sweep.trials)
    parts = []
    if early:
        which = (
            "1 trial was stopped at an earlier rung and is"
            if early == 1
            else (f"{early} trials were stopped at earlier rungs and are")
        )
        parts.append(f"{which} not compared with it.")
    if count["failed"]:
        parts.append(f"{count['failed']} {'trial' if count['failed'] == 1 else 'trials'} failed.")
    if count["running"]:
        have = "trial has" if count["running"] == 1 else "trials have"
        parts.append(f"{count['running']} {have} not ended: all of this may still change.")
    return parts
