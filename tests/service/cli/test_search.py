"""Tests for `amd search`: its config, its output, and a one-line error with exit code 2 on bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs.ledgers import masking_sweep, write_sweep
from tests.support.runs.ledgers import search as search_config
from tests.support.service.command import amd
from tune_spaces.config import SearchConfig
from tune_spaces.report import plots
from tune_spaces.search import run as driver
from tune_spaces.search.plan import SweepPlan, make_plan
from tune_spaces.search.run import SearchResult
from tune_spaces.spaces.space import build_space

PRESET = ("--preset", "demo-image-amd")


class SearchStub:
    """Replaces the sweep driver: records the configs, and plans for a machine with four cores."""

    def __init__(self, state: Any = "succeeded") -> None:
        self.state = state
        self.run: list[SearchConfig] = []
        self.planned: list[SearchConfig] = []

    def search(self, config: SearchConfig, *, quiet: bool = False) -> SearchResult:
        self.run.append(config)
        if not quiet:
            print("trial 0: 88.1")
        return SearchResult(
            state=self.state, run_id="a-sweep", run_folder="/runs/a-sweep", trials={"succeeded": 3}, seconds=1.5
        )

    def preview(self, config: SearchConfig) -> SweepPlan:
        self.planned.append(config)
        return make_plan(config, build_space(config.space, config.train), 540, [{"CPU": 4.0}], gpu=False)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> SearchStub:
    stub = SearchStub()
    monkeypatch.setattr(driver, "search", stub.search)
    monkeypatch.setattr(driver, "preview", stub.preview)
    return stub


def test_the_plan_is_printed_without_running_the_sweep(
    stub: SearchStub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = amd(monkeypatch, capfd, "search", "run", "--space", "masking", *PRESET, "--trials", "9", "--plan")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["trials", "at", "rungs", "training"]
    assert "9 of 40 points" in out
    assert "after 108, 241, 540 steps" in out
    assert not stub.run


def test_the_plan_is_printed_as_one_line_of_json(
    stub: SearchStub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = amd(monkeypatch, capfd, "search", "--space", "masking", *PRESET, "--plan", "--json")
    plan = json.loads(out)
    assert (code, len(out.splitlines())) == (0, 1)
    assert (plan["trials"], plan["at_once"], plan["rungs"]) == (20, 4, [108, 241, 540])


@pytest.mark.parametrize(
    "args",
    [
        ("--space", "masking", *PRESET, "optim.base_lr=0.5"),
        (*PRESET, "optim.base_lr=0.5", "--space", "masking"),
        ("optim.base_lr=0.5", *PRESET, "--space", "masking"),
        ("-p", "demo-image-amd", "optim.base_lr=0.5", "space.use=[masking]"),
    ],
)
def test_run_is_the_default_command(
    stub: SearchStub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    assert amd(monkeypatch, capfd, "search", *args)[0] == 0
    assert amd(monkeypatch, capfd, "search", "run", *args)[0] == 0
    by_default, by_name = stub.run
    assert by_default == by_name
    assert by_default.space.use == ("masking",)
    assert by_default.train.optim.base_lr == 0.5


def test_options_override_the_sweep_config(
    stub: SearchStub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {
        "algorithm": "tpe",
        "stopping": "none",
        "trials": "7",
        "hours": "1.5",
        "seeds": "3",
        "at-once": "2",
        "name": "mine",
        "space": "masking,recipe",
    }
    options = [arg for name, value in values.items() for arg in (f"--{name}", value)]
    assert amd(monkeypatch, capfd, "search", *options, *PRESET, "train.seed=5", "retries=1")[0] == 0
    (config,) = stub.run
    assert (config.algorithm, config.stopping, config.seeds, config.at_once) == ("tpe", "none", 3, 2)
    assert (config.budget.trials, config.budget.hours, config.name) == (7, 1.5, "mine")
    assert config.space.use == ("masking", "recipe")
    assert (config.train.seed, config.retries) == (5, 1)


def test_a_study_uses_grid_search_without_early_stopping(
    stub: SearchStub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert amd(monkeypatch, capfd, "search", "--study", "asymmetry", *PRESET)[0] == 0
    (config,) = stub.run
    assert (config.space.study, config.algorithm, config.stopping) == ("asymmetry", "grid", "none")


def test_options_override_a_sweep_file(
    stub: SearchStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"preset": "demo-image-amd", "space": {"use": ["recipe"]}, "seeds": 2}))
    assert amd(monkeypatch, capfd, "search", "--config", str(file), "--seeds", "3")[0] == 0
    (config,) = stub.run
    assert (config.space.use, config.seeds) == (("recipe",), 3)


def test_the_result_is_printed_as_one_line_of_json(
    stub: SearchStub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = amd(monkeypatch, capfd, "search", "--space", "masking", *PRESET, "--json")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert SearchResult.model_validate_json(out).trials == {"succeeded": 3}


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_failed_sweep_exits_with_code_1(
    stub: SearchStub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], state: str
) -> None:
    stub.state = state
    assert amd(monkeypatch, capfd, "search", "--space", "masking", *PRESET)[0] == 1


def test_a_report_is_regenerated_by_id_and_by_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "pictures", lambda sweep: [])  # plotting takes seconds
    folder = write_sweep(str(tmp_path / "runs" / "a-sweep"), search_config(), masking_sweep(search_config(), 6))
    code, out, err = amd(monkeypatch, capfd, "search", "report", "a-sweep", "--storage", str(tmp_path))
    assert (code, err) == (0, "")
    assert "masking" in out or "student_ratio" in out
    assert (Path(folder) / "report" / "report.md").exists()
    assert amd(monkeypatch, capfd, "search", "report", "a-sw", "--storage", str(tmp_path))[:2] == (code, out)
    code, out, _ = amd(monkeypatch, capfd, "search", "report", folder, "--json")
    assert (code, len(out.splitlines())) == (0, 1)
    assert json.loads(out)["folder"] == f"{folder}/report"
    assert len(json.loads(out)["rows"]) == 6


DATA = "data.train=photos teacher.weights=teacher.pth scaling.device=cpu"
MISTAKES = {
    "--space msking --preset demo-image-amd": "space='msking': unknown; did you mean masking?",
    "--space masking,layers --preset demo-image-amd": "space=layers: a study defines its own space",
    "--space nowhere.yaml --preset demo-image-amd": "nowhere.yaml: cannot be read",
    "--space masking --study layers --preset demo-image-amd": "--space and --study",
    "--study lairs --preset demo-image-amd": "space.study='lairs'",
    "--space masking --preset demo-image-amd optim.baselr=1": "did you mean train.optim.base_lr?",
    "--space masking --preset demo-image-amd budgt.trials=3": "budgt",
    "--space masking --preset demo-image-amd mask.teacher_ratio=0.9": "mask.teacher_ratio=0.9 must not be above",
    "--space masking --preset demo-image-amd --trials 0": "budget.trials=0",
    "--space masking --preset demo-image-amd --hours 0": "budget.hours=0",
    "--space masking --preset demo-image-amd --at-once 0": "at_once=0",
    "--space masking --preset demo-image-amd --algorithm cmaes": "algorithm='cmaes'",
    "--space masking --preset demo-image-amd --name ../up": "name='../up'",
    "--space masking --preset demo-image-amd typo": "'typo' is not an override",
    "--space masking --preset demo-imge-amd": "did you mean demo-image-amd?",
    "--space masking --preset demo-image-mae": "train.objective.kind=mae",
    "--space masking": "pass --preset NAME",
    "--preset demo-image-amd": "space: required",
    "--config nowhere.yaml": "nowhere.yaml: cannot be read",
    "--space masking --preset k400-vit-b teacher.weights=t.pth": "train.data.train: presets contain no data",
    f"--space masking --preset k400-vit-b {DATA}": "train.probe: required, because a sweep ranks trials by probe score",
    f"--space masking --preset k400-vit-b --plan {DATA}": "probe.data.test=…",
}


@pytest.mark.parametrize("args", MISTAKES)
def test_bad_input_prints_one_line_and_exits_with_code_2(
    args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMD_STORAGE", str(tmp_path / "storage"))
    code, out, err = amd(monkeypatch, capfd, "search", *args.split())
    assert code == 2
    assert MISTAKES[args] in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert out == ""
    assert not (tmp_path / "storage").exists()


def test_bad_input_prints_one_line_of_json(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = amd(monkeypatch, capfd, "search", "--space", "masking", *PRESET, "--trials", "0", "--json")
    assert code == 2
    (problem,) = json.loads(out)["problems"]
    assert err == f"error: {problem}\n"


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_folder_without_a_sweep_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], as_json: tuple[str, ...]
) -> None:
    for args in ((str(tmp_path),), ("no-such-sweep", "--storage", str(tmp_path))):
        code, _, err = amd(monkeypatch, capfd, "search", "report", *args, *as_json)
        assert code == 2
        assert "not a sweep" in err
        assert len(err.splitlines()) == 1


def test_invalid_numbers_and_unknown_options_exit_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for args in (("--trials", "many"), ("--trails", "3")):
        code, _, err = amd(monkeypatch, capfd, "search", "--space", "masking", *PRESET, *args)
        assert code == 2
        assert args[0] in err
        assert "Traceback" not in err


def test_help_lists_both_commands(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = amd(monkeypatch, capfd, "search", "--help")
    assert code == 0
    assert "run" in out
    assert "report" in out
