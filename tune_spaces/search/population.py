"""Population-based training: at each rung, choose the trials to replace, and a parent and recipe for each child.

Synchronous: a rung is judged once every running trial has reported it, so decisions are a pure function of the ledger
and the seed, independent of timing and restarts. The cost is that each rung waits for the slowest trial. A child's
record names the parent whose weights it starts from; this module does not access runs or checkpoints.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from amd.config import ConfigError
from tune_spaces.config import POPULATION_DIVISOR, Dimension, SearchConfig
from tune_spaces.ledger import Ledger, TrialRecord
from tune_spaces.search.sampler import seed_of
from tune_spaces.spaces.parameter import Point
from tune_spaces.spaces.space import Space, config_keys_of, config_of, contains, index_of, sample_value, values_of

FACTORS = (0.8, 1.2)  # Jaderberg et al. 2017
RESAMPLE_PROBABILITY = 0.25  # probability of resampling a value instead of perturbing it, as in Ray Tune
MAX_PERTURBATIONS = 20


class Child(NamedTuple):
    """Parent and point of a new trial."""

    parent: TrialRecord
    point: Point


def replacements(ledger: Ledger, level: int) -> list[tuple[TrialRecord, list[TrialRecord]]]:
    """Return the trials to replace at this rung, with their candidate parents.

    Failed trials are replaced first, then the worst, up to a quarter in total. Later events do not affect
    the result, so a restarted sweep makes the same replacements.
    """
    scored = {r.number: r.rungs[level - r.born].score for r in ledger.records.values() if r.born <= level < r.level}
    ranked = [ledger.records[number] for number in sorted(scored, key=lambda number: (-scored[number], number))]
    failed = [r for r in ledger.records.values() if r.state == "failed" and r.level == level]
    count = max(1, (len(ranked) + len(failed)) // POPULATION_DIVISOR)
    best = ranked[:count]
    worst = ranked[len(best) :][::-1][: max(0, count - len(failed))]
    return [(record, best) for record in [*sorted(failed, key=lambda r: r.number), *worst]] if best else []


def make_child(
    search: SearchConfig, space: Space, level: int, replaced: TrialRecord, parents: Sequence[TrialRecord]
) -> Child:
    """Return the child that replaces a trial: a randomly chosen parent, and a point near the parent's."""
    rng = random.Random(seed_of(search.seed, level, replaced.number))
    parent = rng.choice(parents)
    return Child(parent, perturb(space, parent.point, rng))


def perturb(space: Space, point: Point, rng: random.Random) -> Point:
    """Return a point near a parent's, with some dimensions resampled, or the parent's point if no other is found.

    Dimensions that affect the schedule stay fixed, because the parent has already followed its own warm-up.
    """
    for _ in range(MAX_PERTURBATIONS):
        child = {
            name: value if _shapes_schedule(name) else _near(space.dimensions[name], value, rng)
            for name, value in point.items()
        }
        try:
            if config_of(space, child).digest() != config_of(space, point).digest():
                return child
        except ConfigError:  # invalid combination of custom dimensions
            continue
    return point


def _shapes_schedule(name: str) -> bool:
    return any(key.startswith("schedule.") for key in config_keys_of(name))


def _near(dimension: Dimension, value: object, rng: random.Random) -> object:
    """Return a neighbouring choice, or a number scaled by 0.8 or 1.2 within the bounds."""
    if rng.random() < RESAMPLE_PROBABILITY or not contains(dimension, value):
        return sample_value(dimension, rng)
    if values := values_of(dimension):
        index = index_of(dimension, value)
        assert index is not None, "the dimension contains the value"
        return values[min(max(index + rng.choice((-1, 1)), 0), len(values) - 1)]
    assert isinstance(value, int | float)
    assert dimension.low is not None, "validated: a range has both bounds"
    assert dimension.high is not None, "validated: a range has both bounds"
    return min(max(value * rng.choice(FACTORS), dimension.low), dimension.high)
