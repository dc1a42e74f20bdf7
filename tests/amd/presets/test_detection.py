from __future__ import annotations

import pytest

from amd.config import ConfigError, DetectionConfig, validate
from amd.presets.detection import DETECTION_PRESETS
from amd.presets.load import load_config


@pytest.mark.parametrize(
    ("name", "lr", "decay", "gpus"), [("ava-vit-s", 5e-4, 0.6, 16), ("ava-vit-b", 1.25e-4, 0.75, 32)]
)
def test_the_presets_match_the_official_scripts(name: str, lr: float, decay: float, gpus: int) -> None:
    config = DETECTION_PRESETS[name].config
    # The official flags, 1e-3 and 2.5e-4, are per 256 clips; a step has 128.
    assert config.optim.lr == pytest.approx(lr)
    assert (config.optim.layer_decay, config.optim.weight_decay, config.optim.batch_size) == (decay, 0.05, 128)
    assert (config.schedule.epochs, config.encoder.drop_path, config.scaling.workers) == (30, 0.2, (gpus, gpus))
    assert (config.clip.frames, config.clip.sampling_rate_frames, config.clip.size) == (16, 4, (224, 224))
    assert (config.head.resolution, config.evaluation.min_score, config.evaluation.extend) == (7, 0.8, (0.1, 0.05))
    assert config.checkpoint.best_metric == "eval/map"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"data.short_side": 200}, "data.short_side=200 must not be below clip.size=[224, 224]"),
        ({"evaluation.size": [250, 464]}, "evaluation.size=[250, 464] must be positive multiples of clip.patch=16"),
        ({"data.repeats": 2}, "data.repeats=2: detection uses one clip per key frame; set it to 1"),
        ({"data.rand_augment": "rand-m7"}, "data.rand_augment=rand-m7: geometric operations would not move"),
        ({"optim.ema_decay": 0.99}, "optim.ema_decay=0.99: detection does not average the weights"),
        ({"data.jitter_in": [0.5, 0]}, "data.jitter_in.0=0.5: must be less than 0.5"),
    ],
)
def test_an_invalid_config_raises(override: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DetectionConfig, "ava-vit-s", None, override)
    assert caught.value.problems[0].startswith(message)


def test_a_config_round_trips_through_json() -> None:
    config = DETECTION_PRESETS["ava-vit-b"].config
    assert validate(DetectionConfig, config.model_dump(mode="json")) == config
