from __future__ import annotations

import pytest

from amd.presets.preset import UNSET
from amd.presets.pretraining import PRESETS


def test_paper_recipes_use_the_published_hyperparameters() -> None:
    for name in ("k400-vit-s", "k400-vit-b", "ssv2-vit-s", "ssv2-vit-b"):
        config = PRESETS[name].config
        assert config.optim.lr == pytest.approx(2.4e-3)
        assert config.optim.final_lr == pytest.approx(2e-5)
        assert config.clips_per_step == 2048
        assert (config.mask.student_ratio, config.mask.teacher_ratio) == (0.9, 0.75)
        assert config.optim.clip_norm == 0.02
    k400 = PRESETS["k400-vit-b"]
    assert k400.samples is not None
    steps_per_epoch = k400.samples // k400.config.optim.batch_size
    assert steps_per_epoch == 469
    assert k400.config.schedule.total_steps(steps_per_epoch) == 93_800


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_documents_source_and_hardware(name: str) -> None:
    found = PRESETS[name]
    assert found.summary
    assert found.source
    assert found.hardware
    assert found.config.data.train.startswith(("demo:", UNSET))


@pytest.mark.parametrize("name", [name for name, found in PRESETS.items() if found.config.teacher])
def test_a_teacher_preset_trains_the_teacher_that_its_student_needs(name: str) -> None:
    teacher = PRESETS[name].config.teacher
    assert teacher is not None
    teacher_preset = teacher.preset or f"{name.split('-')[0]}-vit-l-teacher"
    source = PRESETS[teacher_preset].config
    assert source.objective.kind == "mae"
    assert source.student.encoder == teacher.encoder
    assert source.clip == PRESETS[name].config.clip
