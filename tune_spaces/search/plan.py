"""What a sweep will do, before it does anything: how many trials side by side, which rungs, how much training.

Train inside Tune deadlocks when more trials start than have room for their workers: each holds a part and waits for
the rest. So the number side by side is counted from the nodes, trial drivers ask for no CPU, and what no node can hold
is refused here. Torch-free and Ray-free: nodes are handed in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from amd.config import ConfigError, ScalingConfig
from amd.flops import step_flops
from tune_spaces.config import SHARE, SearchConfig
from tune_spaces.spaces.space import Space, grid, size

Resources = Mapping[str, float]


class Plan(NamedTuple):
    trials: int
    """At most."""
    points: int | None
    """In the space; none: not countable."""
    at_once: int
    lowered: bool
    """Fewer side by side than asked for."""
    workers: int
    rungs: tuple[int, ...]
    """Steps of a run at each rung."""
    replaced: int
    """Trials at each rung, in population based training."""
    seeds: int
    clips: int
    """Expected, early stopping counted in."""
    pflops: float
    """Of them, forward and backward."""

    def lines(self, hours: float | None = None) -> list[str]:
        points = f" of {self.points} points" if self.points is not None else ""
        several = f", {self.seeds} seeds each" if self.seeds > 1 else ""
        children = f"; at a rung the worst {self.replaced} make room for children of the best" if self.replaced else ""
        more = " (fewer than at_once: there is no room)" if self.lowered else ""
        crew = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        last = f"about {self.clips:,} clips, {self.pflops:.3g} PFLOP"
        return [
            f"trials     {self.trials}{points}{several}{children}",
            f"at once    {self.at_once} of {crew} each{more}",
            f"rungs      after {', '.join(map(str, self.rungs))} steps",
            f"training   {last}" + (f", {_hours(hours)} here, starts and probes not counted" if hours else ""),
        ]


def make_plan(search: SearchConfig, space: Space, steps: int, nodes: Sequence[Resources], gpu: bool) -> Plan:
    """`steps`: of a whole run; `nodes`: what each has in all. Raises ConfigError for what can never run."""
    scaling = search.train.scaling
    if search.algorithm == "grid":
        next(grid(space), None)  # raises where a range has no end of values
    room = trials_that_fit(scaling, nodes, gpu)
    if room == 0:
        raise ConfigError([_no_room(scaling, nodes, gpu)])
    points = size(space)
    trials = min(search.budget.trials, points) if points is not None else search.budget.trials
    at_once = min(search.at_once or room, room, trials)
    rungs = tuple(max(1, round(fraction * steps)) for fraction in search.fractions())
    if len(set(rungs)) < len(rungs):
        raise ConfigError(
            [
                f"rungs={search.rungs}: a run of {steps} steps is too short to be cut {search.rungs - 1} times (steps "
                f"{list(rungs)}); take fewer rungs or a longer schedule"
            ]
        )
    clips = round(trials * search.seeds * _expected_steps(search, rungs) * search.train.clips_per_step)
    return Plan(
        trials=trials,
        points=points,
        at_once=at_once,
        lowered=search.at_once is not None and at_once < min(search.at_once, trials),
        workers=scaling.workers[0],
        rungs=rungs,
        replaced=trials // SHARE if search.algorithm == "pbt" else 0,
        seeds=search.seeds,
        clips=clips,
        pflops=clips * step_flops(search.train).total / 1e15,
    )


def trials_that_fit(scaling: ScalingConfig, nodes: Sequence[Resources], gpu: bool) -> int:
    """How many trials have room for all their workers at the same time; a worker lies on one node."""
    need = scaling.worker_resources(gpu)
    workers = sum(int(min(node.get(name, 0) / amount + 1e-9 for name, amount in need.items())) for node in nodes)
    return workers // scaling.workers[0]


def _expected_steps(search: SearchConfig, rungs: tuple[int, ...]) -> float:
    """Of a trial, if a share 1/reduction of those that are judged at a rung goes on."""
    if search.stopping == "none":
        return rungs[-1]
    if search.stopping == "asha":
        return _judged_from(0, rungs, search.reduction)
    # hyperband: Ray draws the rung from which a trial is judged, earlier ones e times as often as the next
    odds = [math.exp(-first) for first in range(len(rungs))]
    steps = [_judged_from(first, rungs, search.reduction) for first in range(len(rungs))]
    return sum(odd * step for odd, step in zip(odds, steps, strict=True)) / sum(odds)


def _judged_from(first: int, rungs: tuple[int, ...], reduction: int) -> float:
    steps, going = float(rungs[first]), 1.0
    for before, step in itertools.pairwise(rungs[first:]):
        going /= reduction
        steps += going * (step - before)
    return steps


def _no_room(scaling: ScalingConfig, nodes: Sequence[Resources], gpu: bool) -> str:
    need = ", ".join(f"{amount:g} {name}" for name, amount in scaling.worker_resources(gpu).items())
    has = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in nodes) or "none"
    return (
        f"train.scaling.workers={scaling.workers[0]} of {need} each never fit: the cluster's nodes have {has}; ask for "
        "fewer workers or CPUs (scaling.workers, scaling.cpus_per_worker), or add nodes first"
    )


def _hours(hours: float) -> str:
    return f"about {hours * 60:.0f} minutes" if hours < 2 else f"about {hours:.1f} hours"
