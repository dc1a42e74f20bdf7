"""Tests for the estimate of a training job's cost."""

from __future__ import annotations

import pytest

from amd.config import TrainConfig
from amd.presets.load import load_config
from service.jobs.estimate import estimate
from service.jobs.execution.ray_jobs import Capacity


@pytest.mark.parametrize(
    ("device", "gpus", "found"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cpu"),  # two workers need two
        ("auto", 2, "cuda"),
        ("auto", None, None),
        ("cpu", 8, "cpu"),
        ("cuda", 0, "cuda"),
        ("cuda", None, "cuda"),
    ],
)
def test_the_estimate_names_the_device_that_the_job_would_use(device: str, gpus: int | None, found: str | None) -> None:
    overrides = {"scaling.device": device, "scaling.workers": 2}
    config = load_config(TrainConfig, "demo-image-amd", None, overrides)
    capacity = None if gpus is None else Capacity(8.0, gpus, 1e9)
    assert estimate(config, "demo-image-amd", capacity).device == found


def test_the_estimate_has_the_length_of_the_teachers_own_training() -> None:
    def steps(**overrides: object) -> int | None:
        return estimate(
            load_config(TrainConfig, "demo-image-amd", None, overrides), "demo-image-amd", None
        ).teacher_steps

    assert steps() == 2000
    assert steps(**{"teacher.overrides": {"schedule.steps": 700}}) == 700
    assert steps(**{"teacher.preset": None, "teacher.weights": "timm:one"}) is None
