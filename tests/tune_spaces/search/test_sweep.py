"""Tests for sweep state: starting trials, recording results, restarts and budgets."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amd.config import RunConfig, TrainConfig, validate, with_overrides
from amd.storage import join, write_json
from tests.support.runs import ledgers
from tests.support.runs.configs import tiny_video_config
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import TrialRecord
from tune_spaces.search import sweep as module
from tune_spaces.search.progress import NullProgress
from tune_spaces.search.sweep import Sweep
from tune_spaces.spaces.space import baseline, build_space, config_of

CLIPS = 900  # clips in a complete trial
WITH_WEIGHTS = tiny_video_config().model_dump(mode="json")  # the demo's teacher must be trained first


class Clock:
    """Fake for `time.time` and `time.monotonic` that tests can advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now - 500


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(time=made.time, monotonic=made.monotonic))
    return made


class Notes(NullProgress):
    """Records the progress events that a sweep reports."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_rung(self, record: TrialRecord) -> None:
        self.events.append(("rung", record.number))

    def on_trial_end(self, record: TrialRecord) -> None:
        self.events.append((record.state, record.number))


def open_sweep(folder: Path, config: SearchConfig | None = None, **fields: Any) -> Sweep:
    """Open a sweep as the driver does, whether new or from an existing folder."""
    config = config or ledgers.search(**{"seeds": 2, **fields})
    return Sweep(config, build_space(config.space, config.train), str(folder), "a-sweep", Notes())


def result(sweep: Sweep, level: int, score: float = 50.0, time: float = 1000.0) -> dict[str, Any]:
    """Return the result that a trial reports at a rung."""
    fraction, seeds = sweep.config.fractions()[level], sweep.config.seeds
    whole = level == len(sweep.config.fractions()) - 1
    return {
        "level": level,
        "fraction": fraction,
        "step": round(540 * fraction),
        "figures": {ledgers.METRIC: [score] * seeds},
        "clips": round(CLIPS * fraction),
        "seconds": 9.0 * fraction,
        "encoders": ["/encoders/one", "/encoders/two"] if whole else [],
        "time": time,
        ledgers.METRIC: score,
    }


def begin_trial(sweep: Sweep) -> TrialRecord:
    record = sweep.next_trial()
    assert record is not None
    return record


def run_trial(sweep: Sweep, score: float = 50.0) -> int:
    """Run one trial from start to end."""
    number = begin_trial(sweep).number
    for level in range(len(sweep.records[number].rungs), len(sweep.config.fractions())):
        sweep.record_result(number, result(sweep, level, score))
    sweep.record_end(number)
    return number


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "runs" / "a-sweep" / "trials").iterdir())}


def test_the_ledger_records_a_trial_from_start_to_end(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    record = begin_trial(sweep)
    assert (record.number, record.state, record.baseline, record.attempts) == (0, "running", True, 1)
    assert record.point == baseline(sweep.space)
    assert record.overrides == {}
    assert set(record.costs) == {"teacher_gflops", "step_gflops"}
    assert record.costs["teacher_gflops"] < record.costs["step_gflops"]
    sweep.record_result(0, result(sweep, 0, 40.0))
    sweep.record_result(0, result(sweep, 1, 45.0))
    assert [rung.score for rung in open_sweep(tmp_path).records[0].rungs] == [40.0, 45.0]
    sweep.record_result(0, result(sweep, 2, 50.0))
    sweep.record_end(0)
    found = open_sweep(tmp_path).records[0]
    assert found == sweep.records[0]
    assert (found.state, found.score, found.encoders) == ("succeeded", 50.0, ("/encoders/one", "/encoders/two"))
    assert isinstance(sweep.progress, Notes)
    assert sweep.progress.events == [("rung", 0)] * 3 + [("succeeded", 0)]


def test_a_trial_that_ends_before_its_last_rung_is_recorded_as_stopped(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    sweep.record_result(begin_trial(sweep).number, result(sweep, 0))
    sweep.record_end(0)
    assert sweep.records[0].state == "stopped"
    assert sweep.records[0].ended is not None


def test_a_failed_trial_keeps_its_reason_and_rungs(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    sweep.record_result(begin_trial(sweep).number, result(sweep, 0))
    sweep.record_result(0, {"failed": "diverged", "message": "loss is nan\nat step 70"})
    sweep.record_end(0)
    sweep.record_loss(0, "gone")
    record = open_sweep(tmp_path).records[0]
    assert (record.state, record.reason, record.message) == ("failed", "diverged", "loss is nan\nat step 70")
    assert len(record.rungs) == 1
    assert begin_trial(sweep).number == 1


def test_a_trial_whose_process_is_lost_too_often_fails(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    begin_trial(sweep)
    sweep.record_retry(0)
    sweep.record_retry(0)
    assert sweep.records[0].attempts == 3
    sweep.record_loss(0, "its process was lost again and again")
    assert (sweep.records[0].state, sweep.records[0].reason) == ("failed", "node_lost")
    assert open_sweep(tmp_path).records == sweep.records


def test_a_restart_reports_whether_the_trial_has_a_newer_checkpoint(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    runs = begin_trial(sweep).runs
    assert len(runs) == 2
    assert sweep.record_retry(0) is False
    for run in runs:
        write_json(join(str(tmp_path), "runs", run, "checkpoints", "step-00000010", "manifest.json"), {})
        assert sweep.record_retry(0) is True
        assert sweep.record_retry(0) is False


def test_a_rung_reported_twice_is_recorded_once(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    begin_trial(sweep)
    for level in (0, 0, 1, 0, 1, 2, 2):
        sweep.record_result(0, result(sweep, level, score=10.0 * level))
        before = files(tmp_path)
        sweep.record_result(0, result(sweep, level, score=99.0))
        assert files(tmp_path) == before
    assert [rung.score for rung in sweep.records[0].rungs] == [0.0, 10.0, 20.0]


# Restarts


def test_interrupted_trials_resume_first_and_finished_trials_are_unchanged(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, train=WITH_WEIGHTS)
    run_trial(sweep)
    running = [begin_trial(sweep), begin_trial(sweep)]
    sweep.record_result(2, result(sweep, 0))
    sweep.record_result(2, result(sweep, 1))
    sweep.record_result(begin_trial(sweep).number, {"failed": "diverged", "message": "nan"})
    lost_point = begin_trial(sweep).point
    (tmp_path / "runs" / "a-sweep" / "trials" / "0004.json").unlink()  # killed just before it started
    before = files(tmp_path)

    again = open_sweep(tmp_path, train=WITH_WEIGHTS)
    assert again.remaining_trials() == 20 - 4 + 2
    first, second, third = begin_trial(again), begin_trial(again), begin_trial(again)
    assert [first.number, second.number, third.number] == [1, 2, 4]
    assert [first.point, second.point, third.point] == [*(record.point for record in running), lost_point]
    assert [first.runs, second.runs] == [record.runs for record in running]
    assert [first.attempts, second.attempts, third.attempts] == [2, 2, 1]
    assert [again.task(record)["completed_rungs"] for record in (first, second, third)] == [0, 2, 0]
    after = files(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {"0001.json", "0002.json"}


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_sweep_killed_at_any_point_tries_the_same_points_as_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    fields: dict[str, Any] = {"space": {"use": ["masking"]}, "budget": {"trials": 5}, "rungs": 2}
    uninterrupted = open_sweep(tmp_path_factory.mktemp("whole"), **fields)
    while uninterrupted.remaining_trials():
        run_trial(uninterrupted)
    folder = tmp_path_factory.mktemp("killed")
    sweep = open_sweep(folder, **fields)
    while sweep.remaining_trials():
        number = begin_trial(sweep).number
        for level in range(len(sweep.records[number].rungs), 2):
            if data.draw(st.sampled_from([False, False, True])):
                break
            sweep.record_result(number, result(sweep, level))
        else:
            sweep.record_end(number)
            continue
        sweep = open_sweep(folder, **fields)
    states = [(record.number, record.point, record.state) for record in sweep.records.values()]
    assert states == [(record.number, record.point, record.state) for record in uninterrupted.records.values()]


def test_a_stopping_sweep_starts_no_trials_and_lets_running_ones_finish(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    for _ in range(3):
        begin_trial(sweep)
    sweep.record_result(0, result(sweep, 0))
    sweep.stopping.set()
    assert sweep.next_trial() is None
    sweep.record_end(0)
    sweep.record_loss(1, "killed by hand")
    for level in range(3):
        sweep.record_result(2, result(sweep, level))
    sweep.record_end(2)  # it finished anyway
    assert [record.state for record in sweep.records.values()] == ["running", "running", "succeeded"]
    again = open_sweep(tmp_path)
    assert [begin_trial(again).number for _ in range(3)] == [0, 1, 3]


# Budget


def test_the_budget_limits_trials(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, budget={"trials": 3})
    assert [run_trial(sweep) for _ in range(3)] == [0, 1, 2]
    assert sweep.remaining_trials() == 0
    assert sweep.next_trial() is None
    assert not sweep.budget_spent()


def test_the_budget_limits_clips(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, budget={"clips": CLIPS + CLIPS // 5})
    run_trial(sweep)
    assert not sweep.budget_spent()
    begin_trial(sweep)
    sweep.record_result(1, result(sweep, 0))
    assert sweep.clips() == CLIPS + CLIPS // 5
    assert sweep.budget_spent()
    assert sweep.next_trial() is None


def test_the_budget_limits_hours_across_restarts(tmp_path: Path, clock: Clock) -> None:
    sweep = open_sweep(tmp_path, budget={"hours": 1})
    begin_trial(sweep)
    clock.now += 1800
    sweep.record_result(0, result(sweep, 0, time=clock.now))
    assert (sweep.seconds(), sweep.budget_spent()) == (1800, False)
    clock.now += 50_000  # not running
    again = open_sweep(tmp_path, budget={"hours": 1})
    assert again.seconds() == 1800
    assert begin_trial(again).number == 0
    clock.now += 1799
    assert not again.budget_spent()
    clock.now += 1
    assert again.budget_spent()
    assert again.next_trial() is None


def test_the_budget_limits_gpu_hours(tmp_path: Path, clock: Clock) -> None:
    sweep = open_sweep(tmp_path, budget={"gpu_hours": 2})
    clock.now += 1800
    assert not sweep.budget_spent(), "no limit without GPUs"
    sweep.gpus = 4
    assert sweep.budget_spent()
    assert sweep.next_trial() is None


def test_the_hours_between_two_executions_do_not_count_towards_the_budget(tmp_path: Path, clock: Clock) -> None:
    sweep = open_sweep(tmp_path)
    begin_trial(sweep)
    clock.now += 100
    sweep.record_result(0, result(sweep, 0, time=clock.now))
    clock.now += 50_000
    again = open_sweep(tmp_path)
    begin_trial(again)
    clock.now += 100
    again.record_result(0, result(again, 1, time=clock.now))
    assert again.seconds() == 200
    assert open_sweep(tmp_path).seconds() == 200


def test_overlapping_time_of_concurrent_trials_is_counted_once(tmp_path: Path, clock: Clock) -> None:
    sweep = open_sweep(tmp_path)
    begin_trial(sweep)
    clock.now += 100
    begin_trial(sweep)
    clock.now += 100
    for number in (0, 1):
        sweep.record_result(number, {"failed": "diverged", "message": "nan"})
    assert open_sweep(tmp_path).seconds() == 200


@pytest.mark.parametrize(
    ("spent", "raised"),
    [({"trials": 2}, {"trials": 4}), ({"clips": 2 * CLIPS}, {"clips": 4 * CLIPS}), ({"clips": CLIPS}, {"trials": 4})],
)
def test_raising_the_budget_continues_the_sweep(tmp_path: Path, spent: dict[str, int], raised: dict[str, int]) -> None:
    sweep = open_sweep(tmp_path, budget=spent)
    while sweep.next_trial() is not None:
        number = max(sweep.records)
        for level in range(3):
            sweep.record_result(number, result(sweep, level))
        sweep.record_end(number)
    ended = len(sweep.records)
    before = files(tmp_path)
    more = open_sweep(tmp_path, budget=raised)
    assert [run_trial(more) for _ in range(2)] == [ended, ended + 1]
    assert {name: content for name, content in files(tmp_path).items() if name in before} == before


def test_an_exhausted_space_ends_the_sweep(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, space={"dimensions": {"optim.eps": [1e-8, 1e-6, 1e-4]}}, seeds=1)
    for _ in range(3):
        run_trial(sweep)
    assert sweep.next_trial() is None
    assert sweep.remaining_trials() == 17


# Trial tasks


def test_run_names_are_valid_and_unique(tmp_path: Path) -> None:
    config = ledgers.search(name="a" * 80, seeds=3, seed=2**31 - 1)
    sweep = Sweep(config, build_space(config.space, config.train), str(tmp_path), "a" * 80, NullProgress())
    names = [name for _ in range(4) for name in begin_trial(sweep).runs]
    assert len(set(names)) == 12
    (pattern,) = (rule.pattern for rule in RunConfig.model_fields["name"].metadata if hasattr(rule, "pattern"))
    assert all(re.fullmatch(pattern, name) for name in names)
    assert all(with_overrides(config.train, {"name": name}) for name in names)


def test_a_task_contains_only_plain_values(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, seeds=3, train=WITH_WEIGHTS)
    run_trial(sweep)
    record = begin_trial(sweep)
    task = sweep.task(record)
    train = validate(TrainConfig, task["train"])
    assert train.digest() == config_of(sweep.space, record.point).digest()
    assert train.storage == str(tmp_path)
    assert train.name is None
    assert task["runs"] == list(record.runs)
    assert (len(task["runs"]), task["number"], task["completed_rungs"]) == (3, 1, 0)
    assert task["fractions"] == list(sweep.config.fractions())
    assert pickle.loads(pickle.dumps(task)) == task


def test_trials_receive_the_trained_teacher(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    assert sweep.config.train.teacher is not None
    assert sweep.config.train.teacher.preset is not None
    made: dict[str, Any] = {"teacher.weights": "/encoders/teacher", "teacher.preset": None, "teacher.overrides": {}}
    sweep.train = with_overrides(sweep.config.train, made)
    teacher = validate(TrainConfig, sweep.task(begin_trial(sweep))["train"]).teacher
    assert teacher is not None
    assert (teacher.weights, teacher.preset) == ("/encoders/teacher", None)
    assert sweep.records[0].baseline


def test_trial_records_are_written_to_the_sweep_folder(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    begin_trial(sweep)
    assert Path(join(str(tmp_path), "runs", "a-sweep", "trials", "0000.json")).exists()
    assert sweep.folder == join(str(tmp_path), "runs", "a-sweep")


def test_copying_a_sweep_returns_the_sweep_itself(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    assert copy.deepcopy(sweep) is sweep


def test_pickling_a_sweep_returns_the_sweep_itself(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    assert pickle.loads(pickle.dumps(sweep)) is sweep
