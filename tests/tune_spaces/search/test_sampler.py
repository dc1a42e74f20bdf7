"""Tests for the sampler: the ledger determines the next point, no config is repeated, and TPE learns from scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from tests.support.runs import ledgers
from tests.support.runs.configs import tiny_video_config
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, TrialRecord
from tune_spaces.search import sampler
from tune_spaces.search.sampler import Point, distributions, next_point, to_optuna_trial
from tune_spaces.spaces.space import Space, baseline, build_space, config_of, grid_size, overrides_of

ALGORITHMS = ("grid", "random", "tpe")
TRAIN = tiny_video_config().model_dump(mode="json")
EPS: dict[str, Any] = {"dimensions": {"optim.eps": [1e-8, 1e-7, 1e-6], "optim.clip_norm": [None, 0.5]}}
LAYERS = [[{"student": 2, "teacher": 2}, {"student": 4, "teacher": 4}], [{"student": 4, "teacher": 4}]]
SMOOTH: dict[str, Any] = {
    "dimensions": {
        "optim.base_lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "optim.weight_decay": {"low": 0.0, "high": 1.0},
    }
}


def swept(**fields: Any) -> tuple[SearchConfig, Space]:
    config = ledgers.search(**{"train": TRAIN, "seeds": 1, "space": EPS, **fields})
    return config, build_space(config.space, config.train)


def ended(number: int, point: Point, space: Space, score: float, **fields: Any) -> TrialRecord:
    costs = {"teacher_gflops": 1.0 + number % 3, "step_gflops": 2.0}
    values = {"overrides": overrides_of(space, point), "costs": costs, **fields}
    return ledgers.trial(number, point, [ledgers.rung(1.0, [score])], **values)


def synthetic_score(point: Point) -> float:
    """Return a score that depends only on the point."""
    return (sum(json.dumps(point, sort_keys=True).encode()) * 7919 % 1000) / 10


def ledger(folder: Path, records: list[TrialRecord] | None = None) -> Ledger:
    made = Ledger(str(folder))
    made.records.update({record.number: record for record in records or []})
    return made


def run_trials(
    config: SearchConfig, space: Space, history: Ledger, trials: int, score: Callable[[Point], float] = synthetic_score
) -> list[Point]:
    """Run trials one by one, up to this total or until no point is left. Returns all points, including earlier ones."""
    while len(history.records) < trials:
        point = next_point(config, space, history)
        if point is None:
            break
        number = len(history.records)
        history.records[number] = ended(number, point, space, score(point))
    return [history.records[number].point for number in sorted(history.records)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("space", [EPS, {"use": ["masking"]}, {"study": "reduction"}])
def test_the_baseline_comes_first(tmp_path: Path, algorithm: str, space: dict[str, Any]) -> None:
    config, made = swept(space=space, **({} if "study" in space else {"algorithm": algorithm}))
    first = next_point(config, made, ledger(tmp_path))
    assert first is not None
    assert first == baseline(made)
    assert config_of(made, first).digest() == config.train.digest()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("space", "configs"),
    [
        (EPS, 6),
        ({"dimensions": {"mask.student_ratio": [0.6, 0.75], "mask.teacher_ratio": [0.25, 0.6, 0.75]}}, 5),
        ({"dimensions": {"optim.eps": [1e-8, 1e-6], "optim.weight_decay": {"low": 0, "high": 0.5, "step": 0.25}}}, 6),
    ],
)
def test_a_small_space_is_exhausted_without_repeats(
    tmp_path: Path, algorithm: str, space: dict[str, Any], configs: int
) -> None:
    config, made = swept(algorithm=algorithm, space=space)
    history = ledger(tmp_path)
    points = run_trials(config, made, history, 50)
    assert len(points) == len({config_of(made, point).digest() for point in points}) == configs
    assert next_point(config, made, history) is None


@pytest.mark.parametrize(
    "algorithm",
    [
        "grid",
        "random",
        "tpe",
    ],
)
def test_float_rounding_of_steps_creates_no_duplicate_points(tmp_path: Path, algorithm: str) -> None:
    space = {"dimensions": {"optim.weight_decay": {"low": 0.1, "high": 0.5, "step": 0.1}}}
    config, made = swept(algorithm=algorithm, space=space)
    points = run_trials(config, made, ledger(tmp_path), 20)
    assert sorted(point["optim.weight_decay"] for point in points) == [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_every_proposal_from_an_infinite_space_is_a_new_config(tmp_path: Path, algorithm: str) -> None:
    config, made = swept(algorithm=algorithm, space=SMOOTH)
    assert grid_size(made) is None
    points = run_trials(config, made, ledger(tmp_path), 25)
    assert len({config_of(made, point).digest() for point in points}) == 25


def test_a_grid_is_tried_in_order_after_the_baseline(tmp_path: Path) -> None:
    config, made = swept(algorithm="grid")
    points = run_trials(config, made, ledger(tmp_path), 6)
    assert points[0] == {"optim.eps": 1e-8, "optim.clip_norm": config.train.optim.clip_norm}
    values = [(point["optim.eps"], point["optim.clip_norm"]) for point in points[1:]]
    order = [(eps, norm) for eps in (1e-8, 1e-7, 1e-6) for norm in (None, 0.5)]
    assert values == [value for value in order if value != tuple(points[0].values())]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_proposals_depend_only_on_the_ledger_and_survive_a_json_round_trip(tmp_path: Path, algorithm: str) -> None:
    config, made = swept(algorithm=algorithm, space={"use": ["masking"], "dimensions": {"objective.layers": LAYERS}})
    history = Ledger(str(tmp_path))
    for record in range(10):
        point = next_point(config, made, history)
        assert point is not None
        assert next_point(config, made, history) == point
        assert next_point(config, made, Ledger(str(tmp_path))) == point
        history.write(ended(record, point, made, synthetic_score(point)))


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_a_different_seed_proposes_different_points(tmp_path: Path, algorithm: str) -> None:
    sequences = []
    for seed in (0, 1):
        config, made = swept(algorithm=algorithm, space=SMOOTH, seed=seed)
        sequences.append(run_trials(config, made, ledger(tmp_path), 8))
    assert sequences[0][0] == sequences[1][0]  # the baseline
    assert not any(a == b for a, b in zip(sequences[0][1:], sequences[1][1:], strict=True))


LONG = 14
WHOLE: dict[tuple[str, str], tuple[SearchConfig, Space, list[TrialRecord]]] = {}
KINDS = {"choices": {"use": ["masking", "alignment"]}, "ranges": SMOOTH, "recipe": {"use": ["recipe"]}}


def uninterrupted(algorithm: str, kind: str, folder: Path) -> tuple[SearchConfig, Space, list[TrialRecord]]:
    if (algorithm, kind) not in WHOLE:
        config, made = swept(algorithm=algorithm, space=KINDS[kind])
        history = ledger(folder)
        run_trials(config, made, history, LONG)
        WHOLE[algorithm, kind] = config, made, list(history.records.values())
    return WHOLE[algorithm, kind]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(algorithm=st.sampled_from(["random", "tpe"]), kind=st.sampled_from(sorted(KINDS)), cut=st.integers(0, LONG))
def test_a_resumed_sweep_proposes_the_same_points_as_an_uninterrupted_one(
    tmp_path: Path, algorithm: str, kind: str, cut: int
) -> None:
    config, made, records = uninterrupted(algorithm, kind, tmp_path)
    assert run_trials(config, made, ledger(tmp_path, records[:cut]), LONG) == [record.point for record in records]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, LONG - 1), running=st.sets(st.integers(0, LONG - 1), max_size=3))
def test_the_points_of_running_trials_are_not_proposed_again(tmp_path: Path, cut: int, running: set[int]) -> None:
    config, made, records = uninterrupted("tpe", "choices", tmp_path)
    records = [
        record.model_copy(update={"state": "running", "rungs": ()}) if record.number in running else record
        for record in records[:cut]
    ]
    point = next_point(config, made, ledger(tmp_path, records))
    assert point is not None
    assert point == next_point(config, made, ledger(tmp_path, records[::-1]))
    tried = {config_of(made, record.point).digest() for record in records}
    assert config_of(made, point).digest() not in tried


# Conversion to Optuna trials


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("succeeded", TrialState.COMPLETE),
        ("stopped", TrialState.PRUNED),
        ("failed", TrialState.FAIL),
        ("running", TrialState.RUNNING),
    ],
)
@pytest.mark.parametrize("rungs", [0, 2])
def test_every_state_maps_to_an_optuna_state(state: Any, expected: TrialState, rungs: int) -> None:
    config, made = swept()
    point = baseline(made) or {}
    fractions = [1.0, 1.0] if state == "succeeded" else [1 / 9, 1 / 3]
    scores = [ledgers.rung(fraction, [50.0 + level]) for level, fraction in enumerate(fractions)]
    record = ledgers.trial(0, point, scores[:rungs] or (scores[:1] if state == "succeeded" else []), state)
    known = to_optuna_trial(record, made, config)
    assert known is not None
    assert known.state == expected
    assert known.intermediate_values == {level: rung.score for level, rung in enumerate(record.rungs)}
    assert known.values == ([record.score] if state == "succeeded" else None)
    assert known.params == {"optim.eps": 0, "optim.clip_norm": 0}  # indices


def test_the_two_objectives_are_score_and_cost() -> None:
    config, made = swept(algorithm="tpe", against="teacher_gflops", stopping="none")
    known = to_optuna_trial(ended(4, baseline(made) or {}, made, 61.0), made, config)
    assert known is not None
    assert known.values == [61.0, 2.0]
    assert known.intermediate_values == {}


def test_list_choices_survive_a_json_round_trip() -> None:
    config, made = swept(space={"use": ["alignment"]})
    for name, dimension in made.dimensions.items():
        for index, choice in enumerate(dimension.choices or ()):
            point = {**(baseline(made) or {}), name: choice}
            record = TrialRecord.model_validate_json(ledgers.trial(0, point, []).model_dump_json())
            known = to_optuna_trial(record, made, config)
            assert known is not None
            assert known.params[name] == index


def test_true_and_one_are_distinct_choices() -> None:
    _, made = swept()
    two = Space({"flag": made.dimensions["optim.eps"].model_copy(update={"choices": (1, True, "1", None)})}, made.base)
    known = [
        to_optuna_trial(ledgers.trial(0, {"flag": value}, []), two, ledgers.search()) for value in (1, True, "1", None)
    ]
    assert [trial.params["flag"] for trial in known if trial] == [0, 1, 2, 3]


def test_a_range_with_a_step_is_sampled_on_its_grid() -> None:
    config, made = swept(space={"dimensions": {"optim.weight_decay": {"low": 0.0, "high": 1.0, "step": 0.1}}})
    for place in range(11):
        record = ledgers.trial(0, {"optim.weight_decay": place / 10}, [])
        assert to_optuna_trial(record, made, config) is not None, place


# Points outside the space


@pytest.mark.parametrize(
    "point",
    [
        {"optim.base_lr": 5.0, "optim.weight_decay": 0.5},  # above the range
        {"optim.base_lr": 0.01},  # a parameter is missing
        {},
    ],
)
def test_points_outside_the_space_are_ignored(tmp_path: Path, point: Point) -> None:
    config, made = swept(algorithm="tpe", space=SMOOTH)
    stranger = ledgers.trial(0, point, [ledgers.rung(1.0, [50.0])], overrides=point)
    assert to_optuna_trial(stranger, made, config) is None
    points = run_trials(config, made, ledger(tmp_path, [stranger]), 12)
    assert len(points) == 12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_space_without_the_baseline_can_be_searched(tmp_path: Path, algorithm: str) -> None:
    config, made = swept(algorithm=algorithm, space={"dimensions": {"optim.eps": [1e-5, 1e-4, 1e-3]}})
    assert baseline(made) is None
    history = ledger(tmp_path)
    points = run_trials(config, made, history, 9)
    assert sorted(point["optim.eps"] for point in points) == [1e-5, 1e-4, 1e-3]
    assert not any(config_of(made, point).digest() == config.train.digest() for point in points)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_invalid_combinations_of_custom_dimensions_are_skipped(tmp_path: Path, algorithm: str) -> None:
    widths = {"student.encoder.width": [48, 64, 96], "student.encoder.heads": [3, 4]}  # 64 is not divisible by 3
    config, made = swept(algorithm=algorithm, space={"dimensions": widths})
    points = run_trials(config, made, ledger(tmp_path), 40)
    chosen = {(point["student.encoder.width"], point["student.encoder.heads"]) for point in points}
    assert len(points) == 5
    assert chosen == {(48, 3), (96, 3), (48, 4), (64, 4), (96, 4)}


# TPE


def test_points_are_proposed_for_two_objectives_after_trials_stop_early_or_fail(tmp_path: Path) -> None:
    config, made = swept(algorithm="tpe", against="teacher_gflops", stopping="none", space=SMOOTH)
    history = ledger(tmp_path)
    run_trials(config, made, history, 10)
    early = (ledgers.rung(1 / 3, [40.0]),)
    history.records[3] = history.records[3].model_copy(update={"state": "stopped", "rungs": early})
    history.records[5] = history.records[5].model_copy(update={"state": "failed", "rungs": ()})
    history.records[9] = history.records[9].model_copy(update={"state": "running", "rungs": ()})
    points = run_trials(config, made, history, 16)
    assert len({config_of(made, point).digest() for point in points}) == 16


def test_a_point_is_proposed_even_if_all_trials_failed(tmp_path: Path) -> None:
    config, made = swept(algorithm="tpe", space=SMOOTH)
    records = [
        ledgers.trial(number, {"optim.base_lr": 0.001 + number / 1e3, "optim.weight_decay": 0.5}, [], "failed")
        for number in range(12)
    ]
    assert next_point(config, made, ledger(tmp_path, records)) is not None


def smooth(point: Point) -> float:
    """Return a score whose maximum, 0, is at a learning rate of 1e-3 and a weight decay of 0.7."""
    decades, decay = math.log10(point["optim.base_lr"]), float(point["optim.weight_decay"])
    return -((decades + 3) ** 2) - 4 * (decay - 0.7) ** 2


def test_tpe_beats_random_search(tmp_path: Path) -> None:
    tail: dict[str, list[float]] = {"random": [], "tpe": []}
    for seed in range(3):
        for algorithm, scores in tail.items():
            config, made = swept(algorithm=algorithm, space=SMOOTH, seed=seed)
            points = run_trials(config, made, ledger(tmp_path), 22, smooth)
            scores.append(mean(smooth(point) for point in points[11:]))
    assert mean(tail["tpe"]) > 0.75 * mean(tail["random"])  # both below 0


def test_proposing_a_point_prints_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config, made = swept(algorithm="tpe", space=SMOOTH)
    next_point(config, made, ledger(tmp_path, [ended(0, {"optim.base_lr": 0.01, "optim.weight_decay": 0.1}, made, 1)]))
    assert [str(warning.message) for warning in recwarn] == []


def test_distributions_match_the_space() -> None:
    _, made = swept(space={"dimensions": {**SMOOTH["dimensions"], **EPS["dimensions"]}})
    known = distributions(made)
    assert list(known) == list(made.dimensions)
    assert known["optim.base_lr"] == optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)
    assert known["optim.eps"] == optuna.distributions.CategoricalDistribution((0, 1, 2))


def test_tried_configs_are_not_rebuilt_for_each_proposal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, made = swept(algorithm="random", space=SMOOTH)
    history, built = ledger(tmp_path), list[Any]()
    for number in range(20):
        point = next_point(config, made, history)
        assert point is not None
        digest = config_of(made, point).digest()
        history.records[number] = ended(number, point, made, 50.0, digest=digest)
    monkeypatch.setattr(sampler, "config_of", lambda space, point: built.append(point) or config_of(space, point))
    assert next_point(config, made, history) is not None
    assert len(built) == 1
