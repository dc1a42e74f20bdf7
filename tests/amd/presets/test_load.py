"""Tests for loading presets and config files for every kind of run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fsspec
import pytest

from amd.config import ConfigError, DetectionConfig, FinetuneConfig, ProbeConfig, RunConfig, TrainConfig
from amd.presets.load import PRESETS_BY_KIND, find_preset, load_config, load_file
from amd.presets.preset import Preset


@pytest.mark.parametrize(
    ("kind", "name", "close"),
    [
        (TrainConfig, "k400-vitb", "k400-vit-b"),
        (FinetuneConfig, "k400-vit-b-finetun", "k400-vit-b-finetune"),
        (DetectionConfig, "ava-vit-l", "ava-vit-"),
    ],
)
def test_an_unknown_preset_raises_with_a_suggestion(kind: type[RunConfig], name: str, close: str) -> None:
    with pytest.raises(ConfigError, match=f"preset='{name}': unknown; did you mean {close}"):
        load_config(kind, name, None, {})


def test_a_preset_for_another_kind_of_run_is_rejected_with_a_list_of_known_presets() -> None:
    with pytest.raises(ConfigError, match=r"preset='demo-image-amd': unknown; known presets: ava-vit-s, ava-vit-b$"):
        find_preset(DetectionConfig, "demo-image-amd")
    assert find_preset(RunConfig, "demo-image-amd").config.data.train == "demo:digits"


def test_preset_names_are_unique_across_all_kinds_of_run() -> None:
    names = [name for group in PRESETS_BY_KIND.values() for name in group]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("chosen", [(None, None), ("k400-vit-b", "run.json")])
def test_either_a_preset_or_a_file_is_required(chosen: tuple[str | None, str | None]) -> None:
    with pytest.raises(ConfigError, match="specify either a preset or a config file"):
        load_config(TrainConfig, *chosen, {})


def test_a_task_config_can_be_built_from_overrides_without_a_file() -> None:
    config = load_file(ProbeConfig, None, {"encoder": "tiny", "data.train": "a", "data.test": "b"})
    assert (config.encoder, config.data.train, config.data.test) == ("tiny", "a", "b")


def test_values_without_a_default_are_required() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, "k400-vit-b", None, {})
    assert [problem.split(":")[0] for problem in error.value.problems] == ["data.train", "teacher.weights"]
    overrides = {"data.train": "list.csv", "teacher.preset": "k400-vit-l-teacher"}
    config = load_config(TrainConfig, "k400-vit-b", None, overrides)
    assert config.teacher is not None
    assert config.teacher.weights is None


DATA = "data.train: presets contain no data; set data.train=<folder, list file or tar shards>"
WEIGHTS = "weights: this preset needs an AMD ViT-S pre-trained on K400; set weights=<file, URI or encoder id>, or "


@pytest.mark.parametrize(
    ("kind", "name", "overrides", "problems"),
    [
        (FinetuneConfig, "k400-vit-s-finetune", {}, [DATA, WEIGHTS + "weights=null"]),
        (FinetuneConfig, "k400-vit-s-finetune", {"data.train": "x"}, [WEIGHTS + "weights=null"]),
        (
            DetectionConfig,
            "ava-vit-s",
            {"data.train": "x", "data.val": None, "data.boxes": None, "data.excluded": None, "weights": None},
            [
                "data.label_map: presets contain no data; set data.label_map=<ava_action_list_v2.2.pbtxt>",
                "data.evaluated: presets contain no data; set "
                "data.evaluated=<ava_action_list_v2.2_for_activitynet_2019.pbtxt, or null>",
            ],
        ),
    ],
)
def test_every_unset_value_of_a_preset_is_reported_with_its_remedy(
    kind: type[RunConfig], name: str, overrides: dict[str, Any], problems: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(kind, name, None, overrides)
    assert error.value.problems == problems
    assert load_config(kind, name, None, overrides, complete=False).data.train


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "must be an object with the sections of a run, not list"),
        (b"", "must be an object with the sections of a run, not NoneType"),
        (b"a: [1,\nb: {", "neither JSON nor YAML"),
        (bytes(range(256)), "neither JSON nor YAML"),
        (b'{"optim": {"batchsize": 3}}', "did you mean optim.batch_size?"),
    ],
)
def test_an_invalid_config_file_raises(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(TrainConfig, None, str(tmp_path / "c.yaml"), {})


def test_an_unreadable_config_url_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=r"s3://bucket/c\.yaml: cannot be read .*credentials"):
        load_config(TrainConfig, None, "s3://bucket/c.yaml", {})
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("preset", [one for group in PRESETS_BY_KIND.values() for one in group.values()])
def test_workers_with_a_gpu_reserve_cpus_for_their_readers(preset: Preset[Any]) -> None:
    config = preset.config
    if config.scaling.device == "cuda":
        assert config.scaling.cpus_per_worker >= config.data.loader_workers + 1
        assert 8 * config.scaling.cpus_per_worker <= 96, "eight workers fit on a node of 96 CPUs"
