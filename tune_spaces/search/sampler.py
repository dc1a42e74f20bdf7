"""Sampler: choose a sweep's next point as a pure function of its config, seed and ledger.

The sampler is stateless, so a restarted sweep proposes the same points. Optuna samples from a study that is rebuilt
from the ledger for every proposal. Does not import Ray.
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
from tune_spaces.spaces.space import Space, baseline, config_of, contains, grid, grid_size, index_of, values_of

MAX_DRAWS = 100  # attempts before a small space is enumerated in order
MAX_ENUMERATED_POINTS = 100_000
TPE_STARTUP_TRIALS = 8  # random trials before TPE models the scores

optuna.logging.set_verbosity(optuna.logging.ERROR)


def next_point(search: SearchConfig, space: Space, ledger: Ledger) -> Point | None:
    """Return a point whose config has not been tried, starting with the baseline.

    Returns None if no such point is left.
    """
    tried = {record.digest or config_of(space, record.point).digest() for record in ledger.records.values()}
    number = len(ledger.records)
    for point in itertools.chain(_baseline_point(space, number), _proposals(search, space, ledger, number)):
        try:
            digest = config_of(space, point).digest()
        except ConfigError:  # invalid combination of custom dimensions
            continue
        if digest not in tried:
            return point
    return None


def _baseline_point(space: Space, number: int) -> Iterator[Point]:
    point = baseline(space) if number == 0 else None
    if point is not None:
        yield point


def _proposals(search: SearchConfig, space: Space, ledger: Ledger, number: int) -> Iterator[Point]:
    if search.algorithm != "grid":
        study = _study(search, space, ledger) if search.algorithm == "tpe" else None
        for attempt in range(MAX_DRAWS):
            yield _sample(search, space, study, seed_of(search.seed, number, attempt))
        if (grid_size(space) or MAX_ENUMERATED_POINTS) >= MAX_ENUMERATED_POINTS:
            return
    yield from grid(space)


def _sample(search: SearchConfig, space: Space, study: optuna.Study | None, seed: int) -> Point:
    if study is None:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    else:
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=TPE_STARTUP_TRIALS, multivariate=True, constant_liar=True
        )
    proposal = study.ask(fixed_distributions=distributions(space))
    return {name: value_of(dimension, proposal.params[name]) for name, dimension in space.dimensions.items()}


def seed_of(*parts: int) -> int:
    """Derive a seed from several integers; different integers give different seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def _study(search: SearchConfig, space: Space, ledger: Ledger) -> optuna.Study:
    directions = ["maximize", "minimize"] if search.against else ["maximize"]
    study = optuna.create_study(directions=directions)
    for number in sorted(ledger.records):
        trial = to_optuna_trial(ledger.records[number], space, search)
        if trial is not None:
            study.add_trial(trial)
    return study


# Conversion between spaces and Optuna


def distributions(space: Space) -> dict[str, BaseDistribution]:
    return {name: distribution(dimension) for name, dimension in space.dimensions.items()}


def distribution(dimension: Dimension) -> BaseDistribution:
    """Return the Optuna distribution for a dimension; choices are encoded by index, because Optuna rejects lists."""
    if dimension.choices is not None:
        return CategoricalDistribution(tuple(range(len(dimension.choices))))
    assert dimension.low is not None
    assert dimension.high is not None
    with warnings.catch_warnings():  # if step does not divide the range, Optuna lowers `high`, as intended
        warnings.simplefilter("ignore")
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def value_of(dimension: Dimension, drawn: Any) -> Any:
    if dimension.choices is not None:
        return dimension.choices[drawn]
    if dimension.step is not None:  # snap to the grid: floats can differ in the last bit
        return min(values_of(dimension), key=lambda value: abs(value - drawn))
    return drawn


def to_optuna_trial(record: TrialRecord, space: Space, search: SearchConfig) -> FrozenTrial | None:
    """Convert a record to an Optuna trial. Returns None if its point is outside the space, as a baseline may be."""
    point = record.point
    if not all(name in point and contains(dimension, point[name]) for name, dimension in space.dimensions.items()):
        return None
    params = {
        name: index_of(dimension, point[name]) if dimension.choices is not None else point[name]
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
    intermediate = {} if search.against else {level: rung.score for level, rung in enumerate(record.rungs)}
    return create_trial(
        state=state, values=values, params=params, distributions=ranges, intermediate_values=intermediate
    )
