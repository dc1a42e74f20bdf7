from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from amd.artifacts.weights import load_encoder
from amd.config import ConfigError, RunProbeConfig, validate
from amd.downstream.__main__ import main
from amd.downstream.probing.checkpoint_probe import probe_checkpoint
from amd.downstream.probing.run import probe_now
from amd.storage import join, read_json, write_json
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.runs.launch import train
from tests.support.runs.tiny_runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a finished run of 12 steps with checkpoints at steps 8 and 12, probed on its training data."""
    folder = tmp_path_factory.mktemp("run")
    result = train(tiny_run(folder, name="tiny"), local=True, quiet=True)
    assert result.state == "succeeded"
    config = read_json(join(result.run_folder, "config.json"))
    data = {"train": config["data"]["train"], "test": config["data"]["train"], "loader_workers": 0}
    write_json(join(result.run_folder, "config.json"), {**config, "probe": {"data": data, "knn": {"neighbours": 1}}})
    return result.run_folder


def test_scores_of_the_newest_checkpoint_are_merged_into_its_metrics_line(run: str) -> None:
    before = read_metrics(run)
    line = probe_checkpoint(run)
    assert line["step"] == 12
    assert line["eval/knn_top1"] == 100  # every sample is its own nearest neighbour
    assert 0 <= line["eval/top1"] <= 100
    after = read_metrics(run)
    assert after[:-1] == before[:-1]
    assert after[-1] == before[-1] | line


def test_the_last_checkpoint_scores_the_same_as_the_published_encoder(run: str) -> None:
    settings = validate(RunProbeConfig, read_json(join(run, "config.json"))["probe"])
    encoder, card = load_encoder(join(run, "..", "..", "encoders", "tiny"))
    expected = probe_now(settings, encoder, card.clip, card.interpolation)
    line = probe_checkpoint(run)
    assert {name: line[name] for name in expected} == expected


def test_the_command_probes_a_given_step(run: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["probe-checkpoint", "--run", run, "--step", "8", "knn.neighbours=3"]) == 0
    line = json.loads(capfd.readouterr().out)
    assert line["step"] == 8
    assert next(found for found in read_metrics(run) if found["step"] == 8).items() >= line.items()


MISTAKES = {
    "--run nowhere": "--run .*nowhere: contains no run",
    "--run RUN --step 5": "--step 5: .* has no intact checkpoint for that step; available steps: 8, 12",
    "--run RUN knn.neighbours=0": "probe.knn.neighbours=0",
    "--run RUN data.test=/nowhere": "data.test: /nowhere does not exist",
}


@pytest.mark.parametrize("args", MISTAKES)
def test_invalid_input_prints_one_message_and_exits_with_code_2(
    args: str, run: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe-checkpoint", *args.replace("RUN", run).split()]) == 2
    assert re.search(MISTAKES[args], capfd.readouterr().err)


def test_a_run_without_a_checkpoint_or_probe_settings_is_rejected(run: str, tmp_path: Path) -> None:
    config = read_json(join(run, "config.json"))
    write_json(str(tmp_path / "config.json"), config)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        probe_checkpoint(str(tmp_path))
    write_json(str(tmp_path / "config.json"), {name: value for name, value in config.items() if name != "probe"})
    with pytest.raises(ConfigError, match=r"probe\.data: required"):
        probe_checkpoint(str(tmp_path))
