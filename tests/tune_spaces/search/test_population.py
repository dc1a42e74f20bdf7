"""Tests for population-based training: replacements, children, and identical decisions after a restart."""

from __future__ import annotations

import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amd.config import CheckpointConfig
from amd.storage import join
from amd.training.checkpoints.store import CheckpointStore
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.reporting.progress import NullWatcher
from amd.training.run_folder import run_folder
from amd.training.runs.kinds import PRETRAINING
from amd.training.runs.launch import launch
from tests.support.runs import ledgers
from tests.support.runs.configs import tiny_video_config
from tests.support.runs.tiny_runs import tiny_run
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, TrialRecord
from tune_spaces.search.population import FACTORS, perturb, replacements
from tune_spaces.search.progress import NullProgress
from tune_spaces.search.run import prepare_search
from tune_spaces.search.sweep import Sweep
from tune_spaces.search.trial import run_rungs
from tune_spaces.spaces.space import Space, build_space, config_of, contains, index_of

TRAIN = tiny_video_config(schedule__steps=100, schedule__warmup_steps=5).model_dump(mode="json")
RECIPE: dict[str, Any] = {
    "use": ["recipe"],
    "dimensions": {"optim.weight_decay": {"low": 0.0, "high": 0.5, "step": 0.05}},
}


def search(**fields: Any) -> SearchConfig:
    values = {"train": TRAIN, "space": RECIPE, "algorithm": "pbt", "seeds": 1, "rungs": 3, "budget": {"trials": 8}}
    return ledgers.search(**{**values, **fields})


def new_sweep(folder: Path, config: SearchConfig | None = None) -> Sweep:
    config = config or search()
    return Sweep(config, build_space(config.space, config.train), str(folder), "a-sweep", NullProgress())


def report_score(sweep: Sweep, number: int, score: float) -> None:
    """Record `score` for the trial's next rung, then end the trial."""
    record = sweep.records[number]
    fraction = sweep.config.fractions()[record.level]
    rung = {"level": record.level, "fraction": fraction, "step": round(100 * fraction), "time": 0.0, "encoders": []}
    figures = {ledgers.METRIC: [score]}
    sweep.record_result(number, {**rung, "figures": figures, "clips": 100, "seconds": 1.0, ledgers.METRIC: score})
    sweep.record_end(number)


def score_of(record: TrialRecord) -> float:
    """Return a score that depends only on the recipe and the level."""
    return 50 - 10 * abs(float(record.point["recipe.lr_scale"]) - 1.7) + record.level


def run(sweep: Sweep) -> None:
    while (record := sweep.next_trial()) is not None:
        report_score(sweep, record.number, score_of(record))


def summary(sweep: Sweep) -> list[Any]:
    return [
        (r.number, r.point, r.parent, r.inherited, r.born, r.state, [rung.score for rung in r.rungs])
        for r in sweep.records.values()
    ]


def ledger(records: list[TrialRecord], folder: Path) -> Ledger:
    made = Ledger(str(folder))
    made.records.update({record.number: record for record in records})
    return made


# Stopped by a user


def test_a_member_stopped_by_a_user_leaves_and_the_population_continues(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, search(budget={"trials": 4}))
    for score in (50.0, 60.0, 70.0):
        record = sweep.next_trial()
        assert record is not None
        report_score(sweep, record.number, score)
    sweep.request_stop(0, "a-key")  # waits for the others at the first rung
    last = sweep.next_trial()
    assert (sweep.records[0].state, sweep.records[0].reason) == ("stopped", "stopped_by_user")
    assert last is not None
    report_score(sweep, last.number, 80.0)
    run(sweep)
    assert len(sweep.records[0].rungs) == 1
    assert all(record.state in ("succeeded", "stopped") for record in sweep.records.values())
    assert any(record.state == "succeeded" for record in sweep.records.values())


# Replacements


def test_children_of_the_best_trials_replace_the_worst_quarter(tmp_path: Path) -> None:
    scores = [50.0, 80.0, 20.0, 60.0, 90.0, 10.0, 40.0, 70.0]
    records = [ledgers.trial(n, {}, [ledgers.rung(0.2, [s])], "running") for n, s in enumerate(scores)]
    found = replacements(ledger(records, tmp_path), 0)
    assert [replaced.number for replaced, _ in found] == [5, 2]
    assert [[parent.number for parent in parents] for _, parents in found] == [[4, 1], [4, 1]]


def test_failed_members_are_replaced_first_and_have_no_children(tmp_path: Path) -> None:
    records = [
        ledgers.trial(n, {}, [ledgers.rung(0.2, [s])], "running") for n, s in enumerate([50.0, 80.0, 20.0, 60.0, 90.0])
    ]
    failed = [ledgers.trial(n, {}, [], "failed") for n in (5, 6, 7)]
    found = replacements(ledger([*records, *failed], tmp_path), 0)
    assert [replaced.number for replaced, _ in found] == [5, 6, 7]
    assert replacements(ledger(failed, tmp_path / "none"), 0) == []


def test_equal_scores_are_ordered_by_trial_number(tmp_path: Path) -> None:
    records = [ledgers.trial(n, {}, [ledgers.rung(0.2, [50.0])], "running") for n in range(4)]
    ((replaced, parents),) = replacements(ledger(records, tmp_path), 0)
    assert (replaced.number, [parent.number for parent in parents]) == (3, [0])


# Child recipes


@given(seed=st.integers(0, 10_000))
def test_a_childs_recipe_is_perturbed_or_resampled_within_bounds(seed: int) -> None:
    config = search()
    space = build_space(config.space, config.train)
    parent = {
        "recipe.lr_scale": 1.5,
        "recipe.warmup_fraction": 0.1,
        "optim.clip_norm": 0.1,
        "optim.weight_decay": 0.5,
    }
    child = perturb(space, parent, random.Random(seed))
    assert config_of(space, child).digest() != config_of(space, parent).digest()
    assert all(contains(space.dimensions[name], value) for name, value in child.items() if "warmup" not in name)
    assert child["recipe.warmup_fraction"] == 0.1


def test_most_perturbations_are_small(tmp_path: Path) -> None:
    config = search()
    space = build_space(config.space, config.train)
    parent = {"recipe.lr_scale": 1.5, "optim.clip_norm": 0.1}
    numbers = random.Random(0)
    children = [perturb(space, parent, numbers) for _ in range(400)]
    scaled = [child["recipe.lr_scale"] in [1.5 * factor for factor in FACTORS] for child in children]
    assert 0.65 < sum(scaled) / 400 < 0.85
    norms = space.dimensions["optim.clip_norm"]
    at = index_of(norms, 0.1)
    assert at is not None
    near = [abs((index_of(norms, child["optim.clip_norm"]) or 0) - at) == 1 for child in children]
    assert sum(near) / 400 > 0.75


def test_a_child_equals_its_parent_if_no_other_recipe_exists() -> None:
    space = Space({}, search().train)
    assert perturb(space, {}, random.Random(0)) == {}


# Complete sweeps


def test_a_population_keeps_its_size_and_finishes(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path)
    run(sweep)
    states = [record.state for record in sweep.records.values()]
    assert (len(states), states.count("succeeded"), states.count("stopped")) == (12, 8, 4)
    children = [record for record in sweep.records.values() if record.parent is not None]
    assert [child.born for child in children] == [1, 1, 2, 2]
    for child in children:
        assert child.parent is not None
        parent = sweep.records[child.parent]
        assert child.inherited == parent.rungs[child.born - 1 - parent.born].step
        assert not child.baseline
    assert sweep.records[0].baseline
    assert (sweep.remaining_trials(), sweep.is_waiting()) == (0, False)


def test_no_member_continues_before_all_have_reached_the_rung(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path)
    under_way = [sweep.next_trial() for _ in range(8)]
    assert sweep.next_trial() is None
    assert sweep.is_waiting()
    for record in under_way[:-1]:
        assert record is not None
        report_score(sweep, record.number, score_of(record))
        assert sweep.next_trial() is None
    assert under_way[-1] is not None
    report_score(sweep, under_way[-1].number, 10.0)
    record = sweep.next_trial()
    assert record is not None
    assert record.level == 1


def test_a_failed_trial_is_replaced(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path)
    for _ in range(8):
        record = sweep.next_trial()
        assert record is not None
        if record.number in (2, 5, 6):
            sweep.record_result(record.number, {"failed": "nan_loss", "message": "not finite"})
            sweep.record_end(record.number)
        else:
            report_score(sweep, record.number, score_of(record))
    run(sweep)
    states = [record.state for record in sweep.records.values()]
    assert (states.count("failed"), states.count("succeeded")) == (3, 8)


def test_a_sweep_ends_if_all_trials_fail(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path)
    while (record := sweep.next_trial()) is not None:
        sweep.record_result(record.number, {"failed": "nan_loss", "message": "not finite"})
        sweep.record_end(record.number)
    assert len(sweep.records) == 8
    assert not sweep.is_waiting()


def test_a_population_has_no_more_members_than_its_space_has_points(tmp_path: Path) -> None:
    config = search(space={"dimensions": {"optim.eps": [1e-8, 1e-7, 1e-6, 1e-5, 1e-4]}})
    sweep = new_sweep(tmp_path, config)
    while (record := sweep.next_trial()) is not None:
        report_score(sweep, record.number, float(record.number))
    assert sum(record.parent is None for record in sweep.records.values()) == 5


def test_an_exhausted_budget_also_ends_waiting_trials(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, search(budget={"trials": 8, "clips": 900}))
    run(sweep)
    assert {record.state for record in sweep.records.values()} == {"stopped"}
    assert not sweep.is_waiting()
    assert sweep.clips() >= 900


@pytest.mark.parametrize("seed", range(4))
def test_a_population_killed_at_any_point_makes_the_same_decisions_as_an_uninterrupted_one(
    tmp_path: Path, seed: int
) -> None:
    uninterrupted, fate = new_sweep(tmp_path / "whole"), random.Random(seed)
    run(uninterrupted)
    sweep, side_by_side = new_sweep(tmp_path / "killed"), list[TrialRecord]()
    while True:
        if fate.random() < 0.15:
            sweep, side_by_side = new_sweep(tmp_path / "killed"), []
        elif len(side_by_side) < 3 and (record := sweep.next_trial()) is not None:
            side_by_side.append(record)
        elif side_by_side:
            done = side_by_side.pop(fate.randrange(len(side_by_side)))
            report_score(sweep, done.number, score_of(done))
        else:
            break
    assert summary(sweep) == summary(uninterrupted)


def test_a_sweep_recovers_if_killed_between_creating_a_child_and_ending_the_trial_it_replaces(tmp_path: Path) -> None:
    uninterrupted = new_sweep(tmp_path / "whole")
    run(uninterrupted)
    sweep = new_sweep(tmp_path / "killed")
    for _ in range(8):
        record = sweep.next_trial()
        assert record is not None
        report_score(sweep, record.number, score_of(record))
    sweep.next_trial()
    trials = tmp_path / "killed" / "runs" / "a-sweep" / "trials"
    (trials / "0009.json").unlink()  # the second child has not been written
    stopped = [record for record in sweep.records.values() if record.state == "stopped"]
    for record in stopped:
        sweep.ledger.write(record.model_copy(update={"state": "running", "ended": None}))
    again = new_sweep(tmp_path / "killed")
    run(again)
    assert summary(again) == summary(uninterrupted)


# Real runs


def population_config(folder: Path) -> SearchConfig:
    train = tiny_run(folder, schedule__steps=12, checkpoint__keep_last=1, checkpoint__every_steps=1)
    data = {"train": str(folder / "images"), "test": str(folder / "images"), "loader_workers": 0}
    return search(
        train={**train.model_dump(mode="json"), "probe": {"data": data, "knn": {"neighbours": 3}}},
        space={"use": ["recipe"]},
        rungs=2,
        budget={"trials": 4},
    )


def run_with_kill(folder: Path, config: SearchConfig, killed_after: int) -> Sweep:
    """Run a sweep in this process, kill it just before a given rung is written, and restart it."""
    root = str(folder)
    config, space = prepare_search(config.model_copy(update={"storage": root}), root, "live")
    sweep, rungs = Sweep(config, space, root, "live", NullProgress()), 0
    local = partial(launch, local=True)
    while (record := sweep.next_trial()) is not None:
        for report in run_rungs(sweep.task(record), threading.Event(), NullWatcher(), local):
            rungs += 1
            if rungs == killed_after:
                sweep = Sweep(config, space, root, "live", NullProgress())
                break
            sweep.record_result(record.number, report)
        else:
            sweep.record_end(record.number)
    return sweep


def test_a_child_continues_from_its_parents_weights_and_step(tmp_path: Path) -> None:
    config = population_config(tmp_path)
    sweep = run_with_kill(tmp_path / "one", config, killed_after=5)
    assert [record.state for record in sweep.records.values()].count("succeeded") == 4
    (child,) = (record for record in sweep.records.values() if record.parent is not None)
    assert (child.inherited, child.rungs[0].clips) == (6, 6 * config.train.clips_per_step)
    steps = [line["step"] for line in read_metrics(run_folder(str(tmp_path / "one"), child.runs[0]))]
    assert min(steps) > 6

    # its weights match a run that starts from the parent's checkpoint with the child's recipe
    assert child.parent is not None
    parent = sweep.records[child.parent]
    policy = CheckpointConfig()
    theirs = CheckpointStore(join(run_folder(str(tmp_path / "one"), parent.runs[0]), "checkpoints"), policy)
    assert child.inherited in theirs.committed()
    by_hand = CheckpointStore(join(str(tmp_path / "hand" / "runs" / "by-hand"), "checkpoints"), policy)
    by_hand.save(child.inherited, theirs.load(child.inherited), theirs.metrics(child.inherited))
    by_hand.wait()
    train = config_of(build_space(config.space, config.train), child.point)
    train = train.model_copy(update={"storage": str(tmp_path / "hand"), "probe": None})
    launch(train, PRETRAINING, local=True, run_id="by-hand", quiet=True)
    ours = CheckpointStore(join(run_folder(str(tmp_path / "one"), child.runs[0]), "checkpoints"), policy)
    for name, tensor in by_hand.load(12).tensors["model"].items():
        assert torch.equal(tensor, ours.load(12).tensors["model"][name])


def test_a_child_fails_with_an_explanation_if_its_parents_checkpoint_is_missing(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    result = launch(config, PRETRAINING, local=True, run_id="orphan", parent=("nobody", 4), quiet=True)
    assert (result.state, result.reason) == ("failed", "storage_unreachable")
    assert "runs/nobody/checkpoints/step-00000004: checkpoint not found" in result.message
