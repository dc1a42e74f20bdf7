"""Tests for the text and files of reports on synthetic ledgers (page.py, verdict.py, plots/ and formatting.py)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from rich.console import Console

from amd.config import ConfigError, TrainConfig, validate
from amd.storage import join, listdir, read_bytes, read_json, write_json
from tests.support.runs.ledgers import masking_sweep, ratios, rung, search, trial, write_sweep
from tune_spaces.report import Report, show, write_report

THIRD, NINTH = 1 / 3, 1 / 9


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}/a-sweep"


def three(*scores: float) -> list:  # type: ignore[type-arg]
    """Return one trial's rungs; the last one has these scores, one per seed."""
    return [rung(NINTH, [50.0] * len(scores)), rung(THIRD, [60.0] * len(scores)), rung(1.0, scores)]


def test_the_report_lists_exactly_the_files_it_wrote(memory: str) -> None:
    report = write_report(write_sweep(memory, search(), masking_sweep(search(), 12)))
    assert report.folder == join(memory, "report")
    assert sorted(report.files) == listdir(report.folder)
    assert {"report.md", "report.json", "best.json", "mask_ratios.png", "cost.svg", "curves.png"} <= set(report.files)
    page = read_bytes(join(report.folder, "report.md")).decode()
    assert set(re.findall(r"\]\(([^)]+)\)", page)) == {name for name in report.files if name.endswith(".png")}
    for name in report.files:
        data = read_bytes(join(report.folder, name))
        assert data.startswith(b"\x89PNG") if name.endswith("png") else len(data) > 100
    assert "Losses at different mask ratios cannot be compared" in page
    assert report.verdict in page
    assert Report.model_validate(read_json(join(report.folder, "report.json"))) == report


def test_the_best_config_is_complete_valid_and_has_no_name(tmp_path: Path) -> None:
    train = search().train.model_dump(mode="json") | {"name": "old", "seed": 7}
    train["probe"] = {"data": {"train": "demo:digits/probe", "test": "demo:digits/select"}}
    config = search(train=train)
    folder = write_sweep(str(tmp_path / "s"), config, masking_sweep(config, 40))
    report = write_report(folder)
    best = validate(TrainConfig, read_json(join(report.folder, "best.json")))
    chosen = next(row for row in report.rows if row.best)
    assert best.mask.student_ratio == chosen.overrides["mask.student_ratio"]
    assert best.mask.teacher_ratio == chosen.overrides["mask.teacher_ratio"]
    assert best.name is None
    assert best.seed == 7
    assert best.schedule == config.train.schedule
    assert best.probe is not None
    assert best.probe == config.train.probe


def test_only_trials_at_the_last_rung_can_be_best(memory: str) -> None:
    records = [
        trial(0, ratios(0.75, 0.5), three(80.0, 81.0), baseline=True),
        trial(1, ratios(0.75, 0.25), [rung(NINTH, [99.0, 99.0])], "stopped"),
        trial(2, ratios(0.9, 0.5), three(82.0, 82.5)),
    ]
    report = write_report(write_sweep(memory, search(seeds=2), records))
    assert report.best == 2
    assert [row.number for row in report.rows] == [2, 0, 1]
    assert [row.compared for row in report.rows] == [True, True, False]
    assert "1 trial was stopped at an earlier rung and is not compared" in report.verdict


def test_trials_are_ranked_at_the_highest_rung_before_any_trial_completes(memory: str) -> None:
    records = [
        trial(0, ratios(0.75, 0.5), [rung(NINTH, [70.0])], "running", baseline=True),
        trial(1, ratios(0.75, 0.25), [rung(NINTH, [60.0]), rung(THIRD, [65.0])], "running"),
    ]
    report = write_report(write_sweep(memory, search(seeds=1, first_rung=NINTH), records))
    assert report.best == 1
    assert "No trial has run to completion; the only one at rung 2 of 3, after 1/3 of training" in report.verdict
    assert "where the two are compared: 60.0 % against 70.0 %, that is -10.0 points" in report.verdict
    assert "2 trials have not finished" in report.verdict


def test_a_population_report_shows_the_ancestors_of_the_best_trial(memory: str) -> None:
    config = search(space={"use": ["recipe"]}, algorithm="pbt", seeds=1, rungs=3, budget={"trials": 4})
    records = [
        trial(0, {"recipe.lr_scale": 1.0}, [rung(THIRD, [70.0]), rung(1.0, [75.0])], overrides={}, baseline=True),
        trial(1, {"recipe.lr_scale": 2.0}, [rung(THIRD, [72.0]), rung(2 / 3, [74.0])], "stopped", overrides={}),
        trial(2, {"recipe.lr_scale": 0.4}, [rung(THIRD, [60.0])], "stopped", overrides={}),
        trial(3, {"recipe.lr_scale": 1.6}, [rung(2 / 3, [78.0])], "stopped", overrides={}, parent=1, born=1),
        trial(4, {"recipe.lr_scale": 1.9}, [rung(1.0, [80.0])], overrides={}, parent=3, born=2, inherited=333),
    ]
    report = write_report(write_sweep(memory, config, records))
    assert report.best == 4
    assert "Its weights come from trial 1, then 3." in report.verdict
    assert [row.parent for row in report.rows] == [3, None, 1, None, None]
    page = read_bytes(f"{memory}/report/report.md").decode()
    assert "| trial | point | parent |" in page
    assert "training it from scratch can give a different score" in page
    assert "importance.png" not in report.files


def test_all_trial_states_and_failure_reasons_are_reported(memory: str) -> None:
    records = [
        trial(0, ratios(0.75, 0.5), three(80.0, 81.0, 82.0), baseline=True),
        trial(1, ratios(0.75, 0.25), three(99.0, 99.0, 99.0), "failed", reason="oom", message="out of\nmemory | 80 GB"),
        trial(2, ratios(0.75, 0.75), [rung(NINTH, [71.0, 72.0, 73.0])], "stopped"),
        trial(3, ratios(0.9, 0.5), [], "running"),
        trial(4, ratios(0.9, 0.9), [], "failed", reason="data"),
    ]
    report = write_report(write_sweep(memory, search(), records))
    assert report.best == 0
    assert [row.number for row in report.rows] == [0, 2, 3, 1, 4]
    assert "2 trials failed" in report.verdict
    page = read_bytes(join(report.folder, "report.md")).decode()
    assert "- Trial 1 failed: oom: out of memory | 80 GB" in page
    assert "- Trial 4 failed: data" in page
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show(report))
    shown = console.export_text()
    assert "trial 1 failed: oom: out of memory | 80 GB" in shown
    assert "best, succeeded" in shown


def test_there_is_no_best_trial_if_all_scored_trials_failed(memory: str) -> None:
    report = write_report(write_sweep(memory, search(), [trial(0, ratios(0.75, 0.5), three(80.0, 81.0), "failed")]))
    assert report.best is None
    assert "best.json" not in report.files
    assert "there is no best trial" in report.verdict


def test_plots_from_an_earlier_report_are_removed(memory: str) -> None:
    records = masking_sweep(search(), 12)
    before = write_report(write_sweep(memory, search(), records))
    for record in records[1:]:
        write_json(
            join(memory, "trials", f"{record.number:04d}.json"),
            record.model_copy(update={"state": "failed"}).model_dump(mode="json"),
        )
    after = write_report(memory)
    assert "mask_ratios.png" in before.files
    assert "mask_ratios.png" not in after.files
    assert sorted(after.files) == listdir(after.folder)


def test_the_same_ledger_produces_the_same_files(memory: str, tmp_path: Path) -> None:
    reports = [
        write_report(write_sweep(folder, search(), masking_sweep(search(), 6))) for folder in (memory, str(tmp_path))
    ]
    for name in reports[0].files:
        if name != "report.json":  # contains the path of its folder
            assert read_bytes(join(reports[0].folder, name)) == read_bytes(join(reports[1].folder, name)), name


def test_a_report_is_written_for_a_single_trial(memory: str) -> None:
    record = trial(0, ratios(0.75, 0.5), [rung(1.0, [80.0])], baseline=True)
    report = write_report(write_sweep(memory, search(seeds=1, rungs=1, stopping="none"), [record]))
    assert not any(name.endswith(".png") for name in report.files)  # every plot would be empty
    assert "The only trial that ran to completion: trial 0" in report.verdict


def test_a_study_report_lists_the_variants(memory: str) -> None:
    config = search(space={"study": "asymmetry"})
    records = [
        trial(0, {"variant": "asymmetric"}, [rung(1.0, [80.0, 81.0, 82.0])], baseline=True),
        trial(
            1, {"variant": "symmetric"}, [rung(1.0, [70.0, 71.1, 71.9])], overrides={"mask.teacher_ratio": 0.75},
        ),
    ]  # fmt: skip
    report = write_report(write_sweep(memory, config, records))
    assert "variants.png" in report.files
    assert not {"mask_ratios.png", "importance.png", "parallel.png", "curves.png"} & set(report.files)
    assert "Against asymmetric, the baseline" in report.verdict
    assert "symmetric -10.0 (-10.2 to -9.8) worse" in report.verdict


@pytest.mark.parametrize("metric", ["eval/top1", "eval/knn_centred_top1"])
def test_every_metric_has_a_display_name(memory: str, metric: str) -> None:
    report = write_report(write_sweep(memory, search(metric=metric), masking_sweep(search(), 3)))
    assert report.metric == metric


def test_a_folder_without_a_sweep_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a sweep"):
        write_report(str(tmp_path))
    write_json(str(tmp_path / "config.json"), search().train.model_dump(mode="json"))
    with pytest.raises(ConfigError, match=r"config\.json is not a sweep config"):
        write_report(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not a sweep config"):
        write_report(str(tmp_path))


def test_a_sweep_without_a_scored_rung_is_rejected(memory: str) -> None:
    write_sweep(memory, search(), [])
    with pytest.raises(ConfigError, match="no trial has been scored"):
        write_report(memory)
    write_sweep(memory, search(), [trial(0, ratios(0.75, 0.5), [], "running")])
    with pytest.raises(ConfigError, match="1 trial started, none has been scored"):
        write_report(memory)
    assert "report" not in listdir(memory)


def test_writing_a_report_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    folder = write_sweep(str(tmp_path), search(), masking_sweep(search(), 6))
    code = (
        "import json, sys\nfrom tune_spaces.report import show, write_report\n"
        f"show(write_report({folder!r}))\n"
        "print(json.dumps([name for name in ('torch', 'ray', 'matplotlib.pyplot') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
