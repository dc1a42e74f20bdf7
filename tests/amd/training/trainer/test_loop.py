"""Tests for timed checkpoints and preemption polls in the training loop. See also test_pretraining.py."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.training.process_group import ProcessGroup, Signals
from amd.training.reporting.progress import Event
from amd.training.run_folder import spec_of
from amd.training.trainer.loop import PREEMPTION_POLL_S
from amd.training.trainer.pretraining import Pretraining
from tests.support.runs.tiny_runs import NullHooks, tiny_run

STEPS = 12


class DelayedGroup(ProcessGroup):
    """A single rank whose signals arrive one step late, as they do with several ranks."""

    signal_delay = 1
    sent = Signals()

    def exchange(self, signals: Signals) -> Signals:
        received, self.sent = self.sent, signals
        return received

    def collect(self) -> Signals:
        return self.sent


class TimedHooks(NullHooks):
    """Hooks that advance a simulated clock by the given seconds at each step, and record checkpoints and polls."""

    def __init__(self, step_seconds: list[float]) -> None:
        self.step_seconds, self.now, self.notice_s = step_seconds, 0.0, math.inf
        self.saves: list[tuple[int, float]] = []  # (step, time)
        self.polls: list[float] = []

    def clock(self) -> float:
        return self.now

    def stop_requested(self) -> bool:
        self.now += self.step_seconds.pop(0)
        return False

    def preempted(self) -> bool:
        self.polls.append(self.now)
        return self.now >= self.notice_s

    def emit(self, event: Event) -> None:
        if event["kind"] == "checkpoint":
            self.saves.append((event["step"], self.now))


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(tempfile.mkdtemp())
    tiny_run(folder)  # writes images and a teacher
    return folder


@pytest.mark.parametrize("make_group", [ProcessGroup, DelayedGroup])
@given(
    step_seconds=st.lists(st.floats(0.1, 20), min_size=STEPS, max_size=STEPS),
    every_s=st.floats(0.5, 30),
    every_steps=st.none() | st.integers(2, STEPS),
)
@settings(max_examples=8)
def test_timed_checkpoints_and_preemption_polls_happen_once_per_interval(
    data: Path, make_group: type[ProcessGroup], step_seconds: list[float], every_s: float, every_steps: int | None
) -> None:
    group, hooks = make_group(), TimedHooks([*step_seconds])
    name = f"run-{len(list((data / 'storage').glob('runs/*')))}"
    config = tiny_run(data, name=name, checkpoint__every_steps=every_steps, checkpoint__every_minutes=every_s / 60)
    spec = spec_of(name, str(data / "storage"), config, "")
    assert Pretraining(spec, group, hooks, hooks.clock).run().finished

    by_steps = {step for step in range(1, STEPS + 1) if step == STEPS or (every_steps and step % every_steps == 0)}
    steps = [step for step, _ in hooks.saves]
    assert len({*steps}) == len(steps)
    assert {*steps} >= by_steps
    previous = 0.0
    for step, at_s in hooks.saves:
        assert step in by_steps or at_s - previous >= every_s - 1e-6, f"step {step} was saved too early: {hooks.saves}"
        previous = at_s
    # The longest time without a checkpoint: an interval, the step in which it ends, and any steps of signal delay.
    limit = every_s + (1 + group.signal_delay) * max(step_seconds)
    times = [0.0, *(at_s for _, at_s in hooks.saves)]
    assert all(later - earlier <= limit + 1e-6 for earlier, later in itertools.pairwise(times))
    assert all(
        later - earlier >= PREEMPTION_POLL_S - 1e-6
        for earlier, later in zip(hooks.polls, hooks.polls[1:], strict=False)
    )


@pytest.mark.parametrize("make_group", [ProcessGroup, DelayedGroup])
def test_after_a_preemption_notice_a_checkpoint_is_saved_at_every_poll(
    data: Path, make_group: type[ProcessGroup]
) -> None:
    group, hooks = make_group(), TimedHooks([2.0] * STEPS)
    hooks.notice_s = 4 * 2.0
    name = f"preempted-{make_group.__name__}"
    config = tiny_run(data, name=name, checkpoint__every_steps=None, checkpoint__every_minutes=None)
    assert Pretraining(spec_of(name, str(data / "storage"), config, ""), group, hooks, hooks.clock).run().finished
    noticed = [at_s for at_s in hooks.polls if at_s >= hooks.notice_s]
    assert len(noticed) > 1
    times = [at_s for _, at_s in hooks.saves]
    assert times[: len(noticed)] == noticed
    assert len(times) - len(noticed) <= 1  # the last step
