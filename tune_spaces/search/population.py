"""Population based training: who makes room at a rung, for whose child, and by which recipe the child goes on.

Synchronous: a rung is judged once all that live have told it, so what is decided is a pure function of the ledger and
the seed, however fast each trial was and however often the sweep was begun again. What that costs is waiting for the
slowest at each rung. Knows nothing of runs and checkpoints: a child's record says whose weights it begins from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from amd.config import ConfigError
from tune_spaces.config import SHARE, Dimension, SearchConfig
from tune_spaces.ledger import Ledger, TrialRecord
from tune_spaces.search.sampler import seed_of
from tune_spaces.spaces.parameter import Point
from tune_spaces.spaces.space import Space, config_of, drawn, has, place, sets, values_of

FACTORS = (0.8, 1.2)  # Jaderberg et al. 2017
RESAMPLED = 0.25  # how often a value is drawn anew instead, as in Ray Tune
TRIES = 20


class Birth(NamedTuple):
    parent: TrialRecord
    point: Point


def to_replace(ledger: Ledger, level: int) -> list[tuple[TrialRecord, list[TrialRecord]]]:
    """Who makes room at a level, each with those of whom one becomes the parent.

    Whoever failed on the way makes room, and so many of the worst that it is a quarter. The same whenever it is asked
    again: what became of trials later, or of those that made room, decides nothing.
    """
    scored = {r.number: r.rungs[level - r.born].score for r in ledger.records.values() if r.born <= level < r.level}
    ranked = [ledger.records[number] for number in sorted(scored, key=lambda number: (-scored[number], number))]
    failed = [r for r in ledger.records.values() if r.state == "failed" and r.level == level]
    count = max(1, (len(ranked) + len(failed)) // SHARE)
    best = ranked[:count]
    worst = ranked[len(best) :][::-1][: max(0, count - len(failed))]
    return [(record, best) for record in [*sorted(failed, key=lambda r: r.number), *worst]] if best else []


def born(
    search: SearchConfig, space: Space, level: int, replaced: TrialRecord, parents: Sequence[TrialRecord]
) -> Birth:
    """The child in place of a trial: a parent by lot, and a point near the parent's."""
    numbers = random.Random(seed_of(search.seed, level, replaced.number))
    parent = numbers.choice(parents)
    return Birth(parent, perturbed(space, parent.point, numbers))


def perturbed(space: Space, point: Point, numbers: random.Random) -> Point:
    """Another point near a parent's, or anew in some dimensions; the parent's own where there is none.

    What shapes the schedule stays: in the middle of a run the warm-up is over, or half done.
    """
    for _ in range(TRIES):
        child = {
            name: value if _shapes_schedule(name) else _near(space.dimensions[name], value, numbers)
            for name, value in point.items()
        }
        try:
            if config_of(space, child).digest() != config_of(space, point).digest():
                return child
        except ConfigError:  # a rule between dimensions of the user's own
            continue
    return point


def _shapes_schedule(name: str) -> bool:
    return any(key.startswith("schedule.") for key in sets(name))


def _near(dimension: Dimension, value: object, numbers: random.Random) -> object:
    """A neighbour of the values in order, or a number 0.8 or 1.2 times as large, within the bounds."""
    if numbers.random() < RESAMPLED or not has(dimension, value):
        return drawn(dimension, numbers)
    if values := values_of(dimension):
        at = place(dimension, value)
        assert at is not None, "it has it"
        return values[min(max(at + numbers.choice((-1, 1)), 0), len(values) - 1)]
    assert isinstance(value, int | float)
    assert dimension.low is not None, "validated: a range has both ends"
    assert dimension.high is not None, "validated: a range has both ends"
    return min(max(value * numbers.choice(FACTORS), dimension.low), dimension.high)
