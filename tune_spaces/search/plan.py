"""Sweep planning: concurrency, rungs and expected training cost.

Ray Train inside Ray Tune deadlocks when more trials start than fit with all their workers: each trial holds some of its
workers and waits for the others. Concurrency is therefore computed from the nodes, and trial drivers request no CPU.
Workers that do not fit on any node are rejected here. Imports neither torch nor Ray; the caller passes the nodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from amd.config import ConfigError, ScalingConfig
from amd.flops import step_flops
from tune_spaces.config import POPULATION_DIVISOR, SearchConfig
from tune_spaces.spaces.space import Space, grid, grid_size

Resources = Mapping[str, float]


class SweepPlan(NamedTuple):
    """Size and expected cost of a sweep."""

    trials: int
    """Maximum number of trials."""
    points: int | None
    """Number of points in the space; None for a continuous space."""
    at_once: int
    """Number of concurrent trials."""
    lowered: bool
    """Whether fewer trials run concurrently than configured."""
    workers: int
    """Number of workers per trial."""
    rungs: tuple[int, ...]
    """Training step at each rung."""
    replaced: int
    """Number of trials replaced at each rung in population-based training."""
    seeds: int
    """Number of runs per trial."""
    clips: int
    """Expected number of training clips, taking early stopping into account."""
    pflops: float
    """Compute needed to train on these clips, forward and backward, in PFLOPs."""
    gpus: int = 0
    """Number of GPUs that concurrent trials reserve."""

    def lines(self, hours: float | None = None) -> list[str]:
        """Format the plan for display. `hours` is the estimated duration on this machine."""
        points = f" of {self.points} points" if self.points is not None else ""
        seeds = f", {self.seeds} seeds each" if self.seeds > 1 else ""
        children = f"; at each rung, children of the best replace the worst {self.replaced}" if self.replaced else ""
        note = " (fewer than at_once: not enough resources)" if self.lowered else ""
        trials = f"{self.at_once} trial{'s' if self.at_once > 1 else ''}"
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        cost = f"about {self.clips:,} clips, {self.pflops:.3g} PFLOP"
        return [
            f"trials     {self.trials}{points}{seeds}{children}",
            f"at once    {trials} with {workers} each{note}",
            f"rungs      after {', '.join(map(str, self.rungs))} steps",
            f"training   {cost}" + (f", {_hours(hours)} here, excluding startup and probes" if hours else ""),
        ]


def make_plan(search: SearchConfig, space: Space, steps: int, nodes: Sequence[Resources], gpu: bool) -> SweepPlan:
    """Plan a sweep with full runs of `steps` steps, on nodes with these total resources.

    Raises ConfigError if the sweep cannot run.
    """
    scaling = search.train.scaling
    if search.algorithm == "grid":
        next(grid(space), None)  # raises for a range without a step
    fitting = max_concurrent_trials(scaling, nodes, gpu)
    if fitting == 0:
        raise ConfigError([_does_not_fit(scaling, nodes, gpu)])
    points = grid_size(space)
    trials = min(search.budget.trials, points) if points is not None else search.budget.trials
    at_once = min(search.at_once or fitting, fitting, trials)
    rungs = tuple(max(1, round(fraction * steps)) for fraction in search.fractions())
    if len(set(rungs)) < len(rungs):
        raise ConfigError(
            [
                f"rungs={search.rungs}: a run of {steps} steps is too short for {search.rungs} distinct rungs (steps "
                f"{list(rungs)}); use fewer rungs or a longer schedule"
            ]
        )
    clips = round(trials * search.seeds * _expected_steps(search, rungs) * search.train.clips_per_step)
    return SweepPlan(
        trials=trials,
        points=points,
        at_once=at_once,
        lowered=search.at_once is not None and at_once < min(search.at_once, trials),
        workers=scaling.workers[0],
        rungs=rungs,
        replaced=trials // POPULATION_DIVISOR if search.algorithm == "pbt" else 0,
        seeds=search.seeds,
        clips=clips,
        pflops=clips * step_flops(search.train).total / 1e15,
        gpus=at_once * scaling.workers[0] if gpu else 0,
    )


def max_concurrent_trials(scaling: ScalingConfig, nodes: Sequence[Resources], gpu: bool) -> int:
    """Return how many trials can run concurrently with all their workers; each worker must fit on a single node."""
    required = scaling.worker_resources(gpu)
    workers = sum(int(min(node.get(name, 0) / amount + 1e-9 for name, amount in required.items())) for node in nodes)
    return workers // scaling.workers[0]


def _expected_steps(search: SearchConfig, rungs: tuple[int, ...]) -> float:
    """Return the expected steps per trial if 1/reduction of the trials judged at a rung continue."""
    if search.stopping == "none":
        return rungs[-1]
    if search.stopping == "asha":
        return _expected_steps_from(0, rungs, search.reduction)
    # hyperband: Ray samples the first rung at which a trial is judged; each is e times as likely as the next
    odds = [math.exp(-first) for first in range(len(rungs))]
    steps = [_expected_steps_from(first, rungs, search.reduction) for first in range(len(rungs))]
    return sum(odd * step for odd, step in zip(odds, steps, strict=True)) / sum(odds)


def _expected_steps_from(first: int, rungs: tuple[int, ...], reduction: int) -> float:
    steps, remaining = float(rungs[first]), 1.0
    for before, step in itertools.pairwise(rungs[first:]):
        remaining /= reduction
        steps += remaining * (step - before)
    return steps


def _does_not_fit(scaling: ScalingConfig, nodes: Sequence[Resources], gpu: bool) -> str:
    required = ", ".join(f"{amount:g} {name}" for name, amount in scaling.worker_resources(gpu).items())
    available = (
        "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in nodes) or "none"
    )
    return (
        f"train.scaling.workers={scaling.workers[0]} of {required} each do not fit: the cluster's nodes have "
        f"{available}; request fewer workers or CPUs (scaling.workers, scaling.cpus_per_worker), or add nodes"
    )


def _hours(hours: float) -> str:
    return f"about {hours * 60:.0f} minutes" if hours < 2 else f"about {hours:.1f} hours"
