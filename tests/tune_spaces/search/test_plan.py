"""Tests for sweep plans: concurrency that fits the cluster, rungs, and costs that match manual calculations."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd.config import ConfigError
from amd.flops import step_flops
from tests.support.runs import ledgers
from tests.support.runs.configs import tiny_video_config
from tune_spaces.config import SearchConfig
from tune_spaces.search.plan import SweepPlan, make_plan, max_concurrent_trials
from tune_spaces.spaces.space import Space, build_space

STEPS = 540
MASKING = build_space(ledgers.search().space, ledgers.search().train)


def planned(config: SearchConfig, steps: int = STEPS, nodes: Any = ({"CPU": 8.0},), gpu: bool = False) -> SweepPlan:
    return make_plan(config, MASKING._replace(base=config.train), steps, nodes, gpu)


def scaled(**fields: Any) -> dict[str, Any]:
    """Return a run config with these scaling settings and a batch size divisible by many numbers of workers."""
    return tiny_video_config(optim__batch_size=240, scaling={"device": "cpu", **fields}).model_dump(mode="json")


def packed(config: SearchConfig, nodes: list[dict[str, float]], gpu: bool) -> int:
    """Count the trials whose workers all fit when placed one by one, in Ray's resource units of 1/10,000."""
    scaling = config.train.scaling
    need = round(Fraction(scaling.cpus_per_worker) * 10_000)
    free = [[round(node.get("CPU", 0) * 10_000), int(node.get("GPU", 0))] for node in nodes]
    trials = 0
    while True:
        for _ in range(scaling.workers[0]):
            place = next((node for node in free if node[0] >= need and (not gpu or node[1] >= 1)), None)
            if place is None:
                return trials
            place[0] -= need
            place[1] -= int(gpu)
        trials += 1


@given(
    nodes=st.lists(
        st.fixed_dictionaries({"CPU": st.sampled_from([0.0, 0.5, 1, 2, 3, 4, 7, 16]), "GPU": st.integers(0, 4)}),
        max_size=4,
    ),
    workers=st.integers(1, 6),
    cpus=st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0]),
    at_once=st.none() | st.integers(1, 12),
    gpu=st.booleans(),
)
def test_concurrent_trials_fit_the_cluster_or_the_sweep_is_rejected(
    nodes: list[dict[str, float]], workers: int, cpus: float, at_once: int | None, gpu: bool
) -> None:
    config = ledgers.search(
        train=scaled(workers=workers, cpus_per_worker=cpus), at_once=at_once, budget={"trials": 1000}
    )
    fitting = packed(config, nodes, gpu)
    if fitting == 0:
        with pytest.raises(ConfigError, match=f"train.scaling.workers={workers} of "):
            planned(config, nodes=nodes, gpu=gpu)
        return
    plan = planned(config, nodes=nodes, gpu=gpu)
    trials = MASKING_POINTS
    assert plan.at_once == min(at_once or fitting, fitting, trials)
    assert plan.lowered == (at_once is not None and fitting < min(at_once, trials))
    assert plan.at_once <= fitting
    assert plan.workers == workers


MASKING_POINTS = planned(ledgers.search(budget={"trials": 1000})).trials


@given(st.integers(1, 40), st.integers(1, 20))
def test_fractional_cpus_fill_a_node(tenths: int, cores: int) -> None:
    scaling = ledgers.search(train=scaled(cpus_per_worker=tenths / 10)).train.scaling
    assert max_concurrent_trials(scaling, [{"CPU": float(cores)}], gpu=False) == cores * 10 // tenths


def test_a_worker_is_never_split_across_nodes() -> None:
    config = ledgers.search(train=scaled(cpus_per_worker=3))
    assert planned(config, nodes=[{"CPU": 4.0}, {"CPU": 4.0}]).at_once == 2
    with pytest.raises(ConfigError):
        planned(config, nodes=[{"CPU": 2.0}, {"CPU": 2.0}])


def test_a_trial_can_have_workers_on_several_nodes() -> None:
    config = ledgers.search(train=scaled(workers=3))
    assert planned(config, nodes=[{"CPU": 2.0}] * 3).at_once == 2


def test_the_error_for_resources_that_never_fit_explains_how_to_fix_it() -> None:
    config = ledgers.search(train=scaled(workers=2, cpus_per_worker=4))
    with pytest.raises(ConfigError) as error:
        planned(config, nodes=[{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}], gpu=True)
    (line,) = error.value.problems
    assert line.startswith("train.scaling.workers=2 of 4 CPU, 1 GPU each do not fit")
    assert "4 CPU, 1 GPU; 2 CPU, 0 GPU" in line
    assert "scaling.cpus_per_worker" in line
    assert "add nodes" in line
    with pytest.raises(ConfigError, match="nodes have none"):
        planned(config, nodes=[])


def test_a_plan_reports_that_fewer_trials_run_concurrently_than_requested() -> None:
    plan = planned(ledgers.search(at_once=20))
    assert (plan.at_once, plan.lowered) == (8, True)
    assert "at once    8 trials with 1 worker each (fewer than at_once: not enough resources)" in plan.lines()
    assert "not enough resources" not in "".join(planned(ledgers.search(at_once=8)).lines())


def test_a_plan_with_fewer_trials_than_the_concurrency_limit_has_no_resource_warning() -> None:
    plan = planned(ledgers.search(at_once=20, budget={"trials": 3}))
    assert (plan.at_once, plan.lowered) == (3, False)


def test_a_sweep_has_no_more_trials_than_its_space_has_points() -> None:
    assert planned(ledgers.search(budget={"trials": 1000})).trials == 40
    assert planned(ledgers.search(budget={"trials": 30})).trials == 30


def test_an_infinite_space_is_limited_by_the_budget() -> None:
    config = ledgers.search(space={"use": ["recipe"]}, budget={"trials": 33})
    plan = make_plan(config, build_space(config.space, config.train), STEPS, [{"CPU": 2.0}], gpu=False)
    assert (plan.points, plan.trials) == (None, 33)
    assert plan.lines()[0] == "trials     33, 3 seeds each"


def test_clip_counts_with_and_without_stopping_match_a_manual_calculation() -> None:
    """All trials run the first 60 of 540 steps, a third run 120 more, and a ninth run the remaining 360."""
    fields: dict[str, Any] = {"seeds": 2, "budget": {"trials": 10}, "first_rung": 1 / 9}
    clips = ledgers.search().train.clips_per_step
    stopped, whole = planned(ledgers.search(**fields)), planned(ledgers.search(**fields, stopping="none"))
    assert stopped.rungs == whole.rungs == (60, 180, 540)
    assert stopped.clips == 10 * 2 * (60 + 40 + 40) * clips
    assert whole.clips == 10 * 2 * 540 * clips
    assert whole.pflops == pytest.approx(whole.clips * step_flops(ledgers.search().train).total / 1e15)


def test_hyperband_costs_are_averaged_over_its_brackets() -> None:
    """Brackets start at 60, 180 or 540 steps, with odds of 1, 1/e and 1/e²."""
    config = ledgers.search(seeds=1, stopping="hyperband", budget={"trials": 10}, first_rung=1 / 9)
    odds, steps = [1, math.exp(-1), math.exp(-2)], [60 + 120 / 3 + 360 / 9, 180 + 360 / 3, 540]
    expected = sum(odd * step for odd, step in zip(odds, steps, strict=True)) / sum(odds)
    assert planned(config).clips == round(10 * expected * config.train.clips_per_step)


def test_a_plan_counts_the_full_training_of_a_population_and_its_children() -> None:
    config = ledgers.search(space={"use": ["recipe"]}, algorithm="pbt", seeds=1, budget={"trials": 9})
    plan = make_plan(config, build_space(config.space, config.train), STEPS, [{"CPU": 2.0}], gpu=False)
    assert plan.rungs == (108, 216, 324, 432, 540)
    assert plan.clips == 9 * STEPS * config.train.clips_per_step
    assert plan.lines()[0] == "trials     9; at each rung, children of the best replace the worst 2"


def test_a_single_rung_disables_early_stopping() -> None:
    one = planned(ledgers.search(rungs=1))
    assert (one.rungs, one.clips) == ((STEPS,), planned(ledgers.search(stopping="none")).clips)


def test_a_run_too_short_for_its_rungs_is_rejected() -> None:
    with pytest.raises(ConfigError) as error:
        planned(ledgers.search(rungs=4), steps=4)
    (line,) = error.value.problems
    assert line.startswith("rungs=4: a run of 4 steps is too short for 4 distinct rungs (steps [1, 1, 2, 4])")
    assert "use fewer rungs or a longer schedule" in line


@given(steps=st.integers(1, 2000), rungs=st.integers(1, 10), reduction=st.integers(2, 10))
def test_rungs_must_be_ascending_steps(steps: int, rungs: int, reduction: int) -> None:
    config = ledgers.search(rungs=rungs, reduction=reduction)
    try:
        made = planned(config, steps=steps).rungs
    except ConfigError as error:
        assert str(error).startswith(f"rungs={rungs}: ")  # noqa: PT017  both outcomes are correct
        first, second = config.fractions()[:2]
        assert steps * (second - first) < 1
        return
    assert list(made) == sorted(set(made))
    assert made[0] >= 1
    assert made[-1] == steps
    assert len(made) == rungs


def test_a_grid_over_a_range_without_a_step_is_rejected_before_any_trial_starts() -> None:
    config = ledgers.search(space={"use": ["recipe"]}, algorithm="grid")
    with pytest.raises(ConfigError, match="a range without a step has no grid; set step or choices"):
        make_plan(config, build_space(config.space, config.train), STEPS, [{"CPU": 2.0}], gpu=False)


def test_a_plan_is_formatted_as_four_lines() -> None:
    config = ledgers.search(train=scaled(workers=2), budget={"trials": 12})
    space = Space(MASKING.dimensions, config.train)
    plan = make_plan(config, space, STEPS, [{"CPU": 8.0}], gpu=False)
    first, second, third, last = plan.lines()
    assert first == "trials     12 of 40 points, 3 seeds each"
    assert second == "at once    4 trials with 2 workers each"
    assert third == "rungs      after 108, 241, 540 steps"
    assert last.startswith(f"training   about {round(12 * 3 * (108 + 133 / 3 + 299 / 9) * 240):,} clips, ")
    assert last.endswith(" PFLOP")
    assert plan.lines(1.5)[-1].endswith("about 90 minutes here, excluding startup and probes")
    assert "about 12.3 hours here" in plan.lines(12.34)[-1]
