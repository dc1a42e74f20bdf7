"""Which point is tried next: a pure function of the sweep's config, its seed and its ledger.

The search keeps no state of its own, so a sweep that was killed proposes what it would have proposed. Optuna samples;
its study is built from the ledger for every proposal. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from amd.config import ConfigError
from tune_spaces.config import Dimension, SearchConfig
from tune_spaces.ledger import Ledger, TrialRecord
from tune_spaces.spaces.parameter import Point
from tune_spaces.spaces.space import Space, baseline, config_of, grid, has, place, size, values_of

TRIES = 100  # draws before a space with few points is gone through in order
SMALL = 100_000  # points
STARTUP = 8  # trials before TPE has something to go by

optuna.logging.set_verbosity(optuna.logging.ERROR)


def next_point(search: SearchConfig, space: Space, ledger: Ledger) -> Point | None:
    """A point whose config was not tried yet; the baseline first. None when there is none left."""
    tried = {record.digest or config_of(space, record.point).digest() for record in ledger.records.values()}
    number = len(ledger.records)
    for point in itertools.chain(_first(space, number), _proposals(search, space, ledger, number)):
        try:
            digest = config_of(space, point).digest()
        except ConfigError:  # a rule between dimensions of the user's own: there is no such config
            continue
        if digest not in tried:
            return point
    return None


def _first(space: Space, number: int) -> Iterator[Point]:
    point = baseline(space) if number == 0 else None
    if point is not None:
        yield point


def _proposals(search: SearchConfig, space: Space, ledger: Ledger, number: int) -> Iterator[Point]:
    if search.algorithm != "grid":
        study = _study(search, space, ledger) if search.algorithm == "tpe" else None
        for attempt in range(TRIES):
            yield _draw(search, space, study, seed_of(search.seed, number, attempt))
        if (size(space) or SMALL) >= SMALL:
            return
    yield from grid(space)


def _draw(search: SearchConfig, space: Space, study: optuna.Study | None, seed: int) -> Point:
    if study is None:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    else:
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True
        )
    asked = study.ask(fixed_distributions=distributions(space))
    return {name: value_of(dimension, asked.params[name]) for name, dimension in space.dimensions.items()}


def seed_of(*parts: int) -> int:
    """A seed of its own for every combination of parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def _study(search: SearchConfig, space: Space, ledger: Ledger) -> optuna.Study:
    directions = ["maximize", "minimize"] if search.against else ["maximize"]
    study = optuna.create_study(directions=directions)
    for number in sorted(ledger.records):
        told = frozen(ledger.records[number], space, search)
        if told is not None:
            study.add_trial(told)
    return study


# Between a space and Optuna's words


def distributions(space: Space) -> dict[str, BaseDistribution]:
    return {name: distribution(dimension) for name, dimension in space.dimensions.items()}


def distribution(dimension: Dimension) -> BaseDistribution:
    """Choices go by their place: Optuna takes no lists."""
    if dimension.choices is not None:
        return CategoricalDistribution(tuple(range(len(dimension.choices))))
    assert dimension.low is not None
    assert dimension.high is not None
    with warnings.catch_warnings():  # a step that does not divide the range: Optuna lowers `high`, as we mean it
        warnings.simplefilter("ignore")
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def value_of(dimension: Dimension, drawn: Any) -> Any:
    if dimension.choices is not None:
        return dimension.choices[drawn]
    if dimension.step is not None:  # as the grid has it: floats differ in their last bit
        return min(values_of(dimension), key=lambda value: abs(value - drawn))
    return drawn


def frozen(record: TrialRecord, space: Space, search: SearchConfig) -> FrozenTrial | None:
    """A record as Optuna has it; None where its point lies outside of the space, as a baseline may."""
    point = record.point
    if not all(name in point and has(dimension, point[name]) for name, dimension in space.dimensions.items()):
        return None
    params = {
        name: place(dimension, point[name]) if dimension.choices is not None else point[name]
        for name, dimension in space.dimensions.items()
    }
    ranges = distributions(space)
    state = {
        "running": TrialState.RUNNING,
        "succeeded": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }[record.state]
    values = None
    if state == TrialState.COMPLETE:
        values = [float(record.score or 0.0), *([record.costs[search.against]] if search.against else [])]
    between = {} if search.against else {level: rung.score for level, rung in enumerate(record.rungs)}
    return create_trial(state=state, values=values, params=params, distributions=ranges, intermediate_values=between)
