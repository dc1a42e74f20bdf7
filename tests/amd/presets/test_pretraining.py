from __future__ import annotations

import re
from pathlib import Path

import fsspec
import pytest

from amd.config import ConfigError
from amd.presets.pretraining import PRESETS, UNSET, from_preset, load_config, preset


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
def test_a_teacher_preset_trains_the_teacher_of_its_student(name: str) -> None:
    teacher = PRESETS[name].config.teacher
    assert teacher is not None
    teacher_preset = teacher.preset or f"{name.split('-')[0]}-vit-l-teacher"
    source = PRESETS[teacher_preset].config
    assert source.objective.kind == "mae"
    assert source.student.encoder == teacher.encoder
    assert source.clip == PRESETS[name].config.clip


def test_an_unknown_preset_raises_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean k400-vit-b"):
        preset("k400-vitb")


def test_values_without_a_default_are_required() -> None:
    with pytest.raises(ConfigError) as error:
        from_preset("k400-vit-b")
    assert [problem.split(":")[0] for problem in error.value.problems] == ["data.train", "teacher.weights"]
    config = from_preset("k400-vit-b", {"data.train": "list.csv", "teacher.preset": "k400-vit-l-teacher"})
    assert config.teacher is not None
    assert config.teacher.weights is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "must be an object with the sections of a run, not list"),
        (b"", "must be an object with the sections of a run, not NoneType"),
        (b"a: [1,\nb: {", "neither JSON nor YAML"),
        (bytes(range(256)), "neither JSON nor YAML"),
        (b'{"optim": {"batchsize": 3}}', "did you mean batch_size?"),
    ],
)
def test_an_invalid_config_file_raises(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, str(tmp_path / "c.yaml"), {})


def test_an_unreadable_config_url_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=r"s3://bucket/c\.yaml: cannot be read .*credentials"):
        load_config(None, "s3://bucket/c.yaml", {})
    fsspec.get_filesystem_class("s3").clear_instance_cache()
