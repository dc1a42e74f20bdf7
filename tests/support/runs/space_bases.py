"""Base configs for search space tests: every preset with a teacher, and small configs for edge cases."""

from __future__ import annotations

from amd.config import TrainConfig
from amd.presets.pretraining import PRESETS
from tests.support.runs.configs import tiny_image_config, tiny_video_config
from tune_spaces.config import SpaceConfig
from tune_spaces.spaces.space import Space, build_space

BASES: dict[str, TrainConfig] = {
    **{name: preset.config for name, preset in PRESETS.items() if preset.config.objective.kind == "amd"},
    "tiny video": tiny_video_config(),
    "tiny image": tiny_image_config(),
    "random masks on video": tiny_video_config(mask__strategy="random"),
    "symmetric": tiny_video_config(mask__teacher_ratio=0.75),
    "full view": tiny_video_config(mask__teacher_ratio=0.0),
    "direct alone": tiny_video_config(objective__weights__generation=0),
    "generation alone": tiny_video_config(objective__weights__direct=0),
    "no reconstruction": tiny_video_config(objective__weights__reconstruction=0),
    "odd layers": tiny_video_config(objective__layers=[{"student": 4, "teacher": 1}, {"student": 1, "teacher": 3}]),
    "shallow": tiny_video_config(
        student__encoder__depth=1, teacher__encoder__depth=2, objective__layers=[{"student": 1, "teacher": 2}]
    ),
    "a wide generator": tiny_image_config(student__generator__width=96, student__generator__heads=3),
    "warm-up in epochs, run in steps": tiny_image_config(schedule__warmup_epochs=1),
    "warm-up in steps": tiny_image_config(schedule__warmup_steps=1),
    "four cells": tiny_video_config(clip__size=8, mask__student_ratio=0.75, mask__teacher_ratio=0.5),
}

# Without teacher-only tokens or a generation loss, a base config has no generators to vary.
NO_GENERATION = {"symmetric", "direct alone"}


def space_of(name: str, **config: object) -> Space:
    return build_space(SpaceConfig.model_validate(config), BASES[name])
