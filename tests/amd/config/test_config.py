from __future__ import annotations

import subprocess
import sys

import pytest

from amd.config import ConfigError, DataConfig, TrainConfig, data_config, parse_overrides, validate, with_overrides
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config

WRONG = {
    "mask.teacher_ratio=0.95": ("mask.teacher_ratio=0.95", "mask.student_ratio=0.75", "sees"),
    "mask.teacher_ratio=0.76 mask.student_ratio=0.78": ("12 of 16 cells",),
    "mask.student_ratio=0.01 mask.teacher_ratio=0": ("mask.student_ratio", "hides none"),
    "mask.student_ratio=1.0": ("mask.student_ratio",),
    "objective.layers.0.student=9": ("objective.layers.0.student=9", "student.encoder.depth=4"),
    "objective.layers.1.teacher=5": ("objective.layers.1.teacher=5", "teacher.encoder.depth=4"),
    "objective.layers=[{student: 2, teacher: 2}, {student: 2, teacher: 4}]": ("student blocks [2, 2] repeat",),
    "objective.layers=[]": ("at least one layer pair",),
    "objective.weights.direct=0 mask.teacher_ratio=0.75": ("nothing is aligned",),
    "objective.weights.reconstruction=0 objective.layers.1.student=3": ("blocks after the last aligned one",),
    "clip.size=18": ("clip.size", "clip.patch=4"),
    "clip.frames=5": ("clip.frames=5", "clip.tubelet=2"),
    "clip.std=[0,1,1]": ("clip.std",),
    "mask.teacher_rato=0.5": ("mask.teacher_rato", "did you mean mask.teacher_ratio?"),
    "mask.strategy=tubes": ("mask.strategy='tubes'", "'tube'"),
    "teacher.weights=null": ("teacher.weights", "neither is set"),
    "teacher=null": ("objective.kind=amd requires a teacher", "teacher.preset"),
    "objective.kind=mae": ("teacher", "objective.kind=mae does not use a teacher"),
    "name=../../x": ("name='../../x'",),
    "student.encoder.width=50": ("student.encoder.width=50", "encoder.heads=3"),
    "student.encoder.position_grid=[4,4]": (
        "position_grid=[4, 4]",
        "requires encoder.positions=sincos_2d, not sincos_1d",
    ),
    "student.encoder.positions=sincos_2d student.encoder.position_grid=1000": ("from 1 to 256",),
    "student.encoder.size=XL": ("'XL' is not one of S, B, L, H"),
    "student.generator.heads=5": ("student.generator.heads=5", "64"),
    "student.generator.width=48 student.generator.heads=5": ("student.generator.heads=5", "student.generator.width=48"),
    "student.generator.width=50 student.encoder.positions=sincos_2d": ("student.generator.width=50", "multiple of 4"),
    "optim.batch_size=7 scaling.workers=2": ("optim.batch_size=7", "scaling.workers=2"),
    "scaling.workers=[4,2]": ("scaling.workers=[4, 2]",),
    "scaling.workers=16": ("scaling.workers=16", "optim.batch_size=8"),
    "schedule.warmup_steps=9": ("schedule.warmup_steps=9", "steps=4"),
    "mask.decoder=running_cell mask.decoder_ratio=0.4": ("mask.decoder_ratio=0.4",),
    "mask.decoder=running_cell clip.size=12": ("even token grid, not 3x3",),
    "optim.base_lr=nan": ("optim.base_lr",),
    "mask.student_ratio.deep=1": ("mask.student_ratio",),
    "data=/data/images": "data='/data/images': is a section; did you mean data.train=/data/images?",
    "mask=0.9": "mask=0.9: is a section; set one of its fields: strategy, student_ratio, teacher_ratio, ",
}


@pytest.mark.parametrize("args", WRONG)
def test_an_invalid_config_raises_with_field_rule_and_remedy(args: str) -> None:
    overrides = parse_overrides([args] if "[{" in args else args.split(" "))
    with pytest.raises(ConfigError) as error:
        with_overrides(tiny_video_config(), overrides)
    expected = WRONG[args]
    for part in (expected,) if isinstance(expected, str) else expected:
        assert part in str(error.value)
    assert "Traceback" not in str(error.value)
    assert "pydantic" not in str(error.value).lower()


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        with_overrides(tiny_video_config(), {"objective.layers.0.student": 9, "objective.layers.1.teacher": 7})
    assert len(error.value.problems) == 2


def test_missing_sections_are_reported() -> None:
    with pytest.raises(ConfigError) as error:
        validate(TrainConfig, {"data": {"train": "x"}})
    assert error.value.problems == ["schedule: required, but not set"]


def test_a_config_round_trips_through_json() -> None:
    for config in (tiny_video_config(), tiny_image_config(), mae(tiny_image_config())):
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_overrides_parse_yaml_and_scientific_notation() -> None:
    args = ["optim.base_lr=1e-3", "scaling.workers=[1,2]", "teacher=null", "name=run-7", "clip.size=[16,32]"]
    assert parse_overrides(args) == {
        "optim.base_lr": 1e-3,
        "scaling.workers": [1, 2],
        "teacher": None,
        "name": "run-7",
        "clip.size": [16, 32],
    }


def test_an_argument_without_a_value_raises() -> None:
    with pytest.raises(ConfigError, match="key=value"):
        parse_overrides(["mask.teacher_ratio"])


def test_data_keys_alone_make_a_data_section() -> None:
    assert data_config({"data": "/images"}) == DataConfig(train="/images")
    assert data_config({"data.train": "/images", "data.crop": "center"}) == DataConfig(train="/images", crop="center")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({}, "data: required, but not set; use data=<folder, list file or tar shards>"),
        ({"data": "/images", "data.trian": "/b"}, "data.trian: unknown key; did you mean data.train?"),
        ({"data": "/images", "data.crop": "middle"}, "data.crop='middle': "),
        ({"data": "/images", "data.crop_scale": [0.5, 0.1]}, "data.crop_scale=(0.5, 0.1) must be two fractions"),
        ({"mask.student_ratio": 0.5}, "mask.student_ratio: only data.… keys are accepted"),
    ],
)
def test_problems_of_a_data_section_name_the_key_as_given(overrides: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        data_config(overrides)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(problem)


def test_overriding_the_encoder_size_resets_its_dimensions() -> None:
    config = with_overrides(
        tiny_video_config(objective__layers=[{"student": 12, "teacher": 4}], student__encoder__size="S"), {}
    )
    assert (config.student.encoder.width, config.student.encoder.depth, config.student.encoder.heads) == (384, 12, 6)
    bigger = with_overrides(config, {"student.encoder.size": "B"})
    assert bigger.student.encoder.width == 768


def test_setting_steps_resets_epochs() -> None:
    config = with_overrides(tiny_video_config(), {"schedule.epochs": 3})
    assert config.schedule.steps is None
    assert with_overrides(config, {"schedule.steps": 5}).schedule.epochs is None


def test_the_digest_covers_only_fields_that_determine_the_result() -> None:
    config = tiny_video_config()
    for kept in ({"name": "other"}, {"storage": "s3://x"}, {"tracking.log_every_steps": 3}, {"scaling.workers": 2}):
        assert with_overrides(config, kept).digest() == config.digest(), kept
    for changed in ({"seed": 1}, {"mask.teacher_ratio": 0.5}, {"data.train": "y"}, {"scaling.precision": "bf16"}):
        assert with_overrides(config, changed).digest() != config.digest(), changed


def test_config_and_presets_import_neither_torch_nor_ray() -> None:
    modules = "amd.commands, amd.config, amd.presets.load, amd.storage"
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["img_{:05}.jpg", "f{}.png", "{folder}_{:06}.png", "rgb/{:05d}.jpg", "{0:04}.jpg"])
def test_valid_frame_names_are_accepted(name: str) -> None:
    assert DataConfig(train="x", frame_name=name).frame_name == name


@pytest.mark.parametrize("name", ["../{}.jpg", "/etc/{}", "a/../../{}", "{0.__class__}", "{:999999}", "{other}", "{"])
def test_frame_names_outside_the_folder_or_with_unknown_fields_raise(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.frame_name|frame_name"):
        validate(DataConfig, {"train": "x", "frame_name": name})
