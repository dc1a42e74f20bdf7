"""Verdict on a sweep as text: the best point, its difference from the baseline, and whether that is significant.

Intervals require several seeds, and a difference is claimed only if it remains significant after correction for the
number of comparisons.
"""

from __future__ import annotations

from statistics import mean
from typing import Literal

from tune_spaces.report.figures import CONFIDENCE, Difference, difference_to_baseline, speed_front
from tune_spaces.report.formatting import signed, spread, title
from tune_spaces.report.sweep import SweepHistory, TrialHistory, dimensions

METRIC_NAMES = {
    "eval/knn_top1": "nearest-neighbour top-1",
    "eval/knn_centred_top1": "centred nearest-neighbour top-1",
    "eval/top1": "linear-probe top-1",
}

BaselineComparison = Literal["better", "worse", "uncertain", "not_significant", "unknown"]
ONE_SEED = "one seed, so no interval; repeat with seeds=3"


def compare_with_baseline(sweep: SweepHistory, trial: TrialHistory) -> BaselineComparison:
    """Compare a trial with the baseline.

    `uncertain` means significant only before correction for multiple comparisons.
    """
    _, found = difference_to_baseline(sweep, trial)
    if found is None or found.interval is None:
        return "unknown"
    if not _excludes_zero(found):
        return "not_significant"
    # Bonferroni: with k comparisons, each interval has confidence 1 - 0.05/k.
    _, strict = difference_to_baseline(sweep, trial, 1 - (1 - CONFIDENCE) / comparisons(sweep))
    if strict is None or not _excludes_zero(strict):
        return "uncertain"
    return "better" if found.value > 0 else "worse"


def comparisons(sweep: SweepHistory) -> int:
    """Return the number of scored trials other than the baseline, each of which may appear better by chance."""
    return max(1, len(sweep.scored) - sum(trial is sweep.baseline for trial in sweep.scored))


def _excludes_zero(found: Difference) -> bool:
    assert found.interval is not None
    low, high = found.interval
    return low > 0 or high < 0


def verdict(sweep: SweepHistory) -> str:
    """Return the verdict as one paragraph."""
    best = sweep.best
    if best is None:
        return " ".join(["Every scored trial failed, so there is no best trial.", *_rest(sweep)])
    parts = [_best(sweep, best)]
    if sweep.config.space.study is not None:
        parts += [*_variants(sweep), *_chosen(sweep)]
    else:
        parts += [_against_baseline(sweep, best), *_chosen(sweep)]
    return " ".join(part for part in [*parts, *_costs(sweep, best), *_rest(sweep)] if part)


def name(sweep: SweepHistory, trial: TrialHistory) -> str:
    return f"trial {trial.number} ({title(trial.record.point, dimensions(sweep))})"


def _best(sweep: SweepHistory, best: TrialHistory) -> str:
    values = sweep.seeds(best.rungs[sweep.top_level])
    seeds = f" (mean ± sd of {len(values)} seeds)" if len(values) > 1 else " (one seed)"
    compared = len(sweep.compared)
    if sweep.top_level == sweep.levels - 1:
        among = (
            f"Best of {compared} trials that ran to completion"
            if compared > 1
            else "The only trial that ran to completion"
        )
    else:
        among = f"best of {compared} compared" if compared > 1 else "the only one"
        among = f"No trial has run to completion; {among} at rung {sweep.top_level + 1} of {sweep.levels}, "
        among += sweep.describe_level(sweep.top_level)
    line = [trial.number for trial in sweep.ancestry(best)[:-1]]
    weights = f" Its weights come from trial {', then '.join(map(str, line))}." if line else ""
    return f"{among}: {name(sweep, best)} with {spread(values)} % {METRIC_NAMES[sweep.config.metric]}{seeds}.{weights}"


def _against_baseline(sweep: SweepHistory, best: TrialHistory) -> str:
    base = sweep.baseline
    if base is None:
        return "No trial in this sweep uses the base config, so no gain can be reported."
    if base.failed:
        return f"The baseline, trial {base.number}, failed, so no gain can be reported."
    if not base.rungs:
        return f"The baseline, trial {base.number}, has not been scored yet."
    if best is base:
        second = next((trial for trial in sweep.compared if trial is not base), None)
        if second is None:
            return "It is the baseline, the base config of the sweep."
        level, found = difference_to_baseline(sweep, second)
        assert found is not None
        by = f"the next, {name(sweep, second)}, is {-found.value:.1f} points behind"
        return f"It is the baseline, the base config of the sweep; {by}{_interval(found, -1)}."
    level, found = difference_to_baseline(sweep, best)
    if found is None:
        return f"It shares no rung with the baseline, trial {base.number}, so the two cannot be compared."
    text = f"Against the baseline (trial {base.number}, {spread(sweep.seeds(base.rungs[level]))} %) "
    if level < sweep.top_level:
        where = f"rung {level + 1} of {sweep.levels}, {sweep.describe_level(level)}"
        text = f"The baseline, trial {base.number}, reached only {where}, where the two are compared: "
        text += f"{spread(sweep.seeds(best.rungs[level]))} % against {spread(sweep.seeds(base.rungs[level]))} %, "
    text += f"that is {signed(found.value)} points{_interval(found)}"
    return (
        text
        + {
            "better": ": a significant difference, even after correction for all comparisons in this sweep.",
            "worse": ": significantly worse, even after correction for all comparisons in this sweep.",
            "uncertain": ": significant in a single comparison, but not after correction for "
            f"{comparisons(sweep)} comparisons; repeat both with new seeds.",
            "not_significant": ": not a significant difference.",
            "unknown": f" ({_no_interval(sweep, best, level)}).",
        }[compare_with_baseline(sweep, best)]
    )


def _no_interval(sweep: SweepHistory, trial: TrialHistory, level: int) -> str:
    base = sweep.baseline
    seeds = len(sweep.seeds(trial.rungs[level]))
    base_seeds = len(sweep.seeds(base.rungs[level])) if base else 0
    if seeds == base_seeds == 1:
        return ONE_SEED if sweep.config.algorithm != "pbt" else "one run each, so no interval; repeat with another seed"
    return f"no interval: {seeds} and {base_seeds} seeds cannot be paired"


def _interval(found: Difference, sign: int = 1) -> str:
    if found.interval is None:
        return ""
    low, high = sorted(sign * end for end in found.interval)
    return f", 95 % interval {signed(low)} to {signed(high)} (paired by seed)"


def _chosen(sweep: SweepHistory) -> list[str]:
    scored = len(sweep.scored)
    if scored < 2:
        return []
    return [
        f"The best of {scored} is selected by its own score, which is thus biased upwards; expect less on new seeds."
    ]


def _variants(sweep: SweepHistory) -> list[str]:
    base = sweep.baseline
    others = [trial for trial in sweep.scored if trial is not base]
    if base is None or base.failed or not base.rungs:
        return ["The baseline has no score, so the variants are not compared with it."]
    labels = {
        "better": "better",
        "worse": "worse",
        "uncertain": "possibly different",
        "not_significant": "no significant difference",
        "unknown": "",
    }
    results = []
    for trial in sorted(others, key=lambda trial: -mean(sweep.seeds(trial.rungs[trial.reach]))):
        level, found = difference_to_baseline(sweep, trial)
        if found is None:
            results.append(f"{title(trial.record.point, {})} shares no rung with the baseline")
            continue
        where = f" at rung {level + 1}" if level < sweep.top_level else ""
        reach = f" ({signed(found.interval[0])} to {signed(found.interval[1])})" if found.interval else ""
        label = labels[compare_with_baseline(sweep, trial)]
        results.append(
            f"{title(trial.record.point, {})} {signed(found.value)}{reach}{where}" + (f" {label}" if label else "")
        )
    if not results:
        return ["There is no other variant to compare it with yet."]
    seeds = len(sweep.seeds(base.rungs[base.reach]))
    how = "points, with 95 % intervals paired by seed" if seeds > 1 else f"points; {ONE_SEED}"
    text = f"Against {title(base.record.point, {})}, the baseline, in {how}: {'; '.join(results)}."
    count = comparisons(sweep)
    if seeds > 1 and count > 1:
        text += f" Better and worse mean significant after correction for {count} comparisons."
    return [text]


def _costs(sweep: SweepHistory, best: TrialHistory) -> list[str]:
    if sweep.config.against is None or len(sweep.compared) < 2:
        return []
    others = [trial.number for trial in speed_front(sweep) if trial is not best]
    listed = ", ".join(str(number) for number in sorted(others))
    return [f"With two objectives, score and measured speed, trials {listed} are on the Pareto front as well."] * bool(
        others
    )


def _rest(sweep: SweepHistory) -> list[str]:
    """Describe the trials that were stopped early, that failed, or that are still running."""
    count = {state: sum(trial.record.state == state for trial in sweep.trials) for state in ("running", "failed")}
    early = sum(trial.record.state == "stopped" and trial.reach < sweep.top_level for trial in sweep.trials)
    parts = []
    if early:
        which = (
            "1 trial was stopped at an earlier rung and is"
            if early == 1
            else (f"{early} trials were stopped at earlier rungs and are")
        )
        parts.append(f"{which} not compared with the best trial.")
    if count["failed"]:
        parts.append(f"{count['failed']} {'trial' if count['failed'] == 1 else 'trials'} failed.")
    if count["running"]:
        have = "trial has" if count["running"] == 1 else "trials have"
        parts.append(f"{count['running']} {have} not finished, so this verdict can still change.")
    return parts
