from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from amd.artifacts.weights import load_card
from amd.config import FinetuneConfig, TrainConfig
from amd.data.dataset import demo
from amd.demo import DemoFailed, DemoReport, run_demo
from amd.demo.run import in_process
from amd.storage import listdir
from amd.training.reporting.media_files import media_steps
from amd.training.run_folder import RunResult, run_folder

SHORT = {"schedule.steps": 3, "schedule.warmup_steps": 1, "optim.batch_size": 8, "data.loader_workers": 0}


@pytest.fixture(autouse=True)
def _small_data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_DEMO_DIR", str(tmp_path_factory.mktemp("demo")))
    for sizes in (demo.IMAGES, demo.CLIPS):
        for split in sizes:
            monkeypatch.setitem(sizes, split, 40)


def short_demo(storage: Path, output: io.StringIO, **options: Any) -> DemoReport:
    return run_demo(
        str(storage),
        overrides=SHORT,
        teacher_overrides=SHORT,
        console=Console(file=output, width=120),
        **options,
    )


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_demo_produces_a_table_images_and_an_embedding(tmp_path: Path, kind: str) -> None:
    output = io.StringIO()
    report = short_demo(tmp_path, output, image=kind == "image", video=kind == "video")

    (section,) = report.sections
    assert [row.key for row in section.rows] == ["pixels", "random", "teacher", "mae", "amd"]
    for row in section.rows:
        assert len(row.knn) == len(row.linear) == 1
        assert all(0 <= value <= 100 for value in row.knn + row.linear)
    for key in ("teacher", "mae", "amd"):
        row = section.row(key)
        assert row.steps == (3,)
        assert row.seconds[0] > 0
        card = load_card(row.encoders[0])
        assert card.steps == 3
        assert {score.protocol: next(iter(score.values.values())) for score in card.scores} == {
            "knn": row.knn[0],
            "linear": row.linear[0],
        }
        assert card.best_score == ("eval/top1", row.linear[0])
        assert Path(row.pictures[0]).stem == card.run == card.id
    assert load_card(section.row("amd").encoders[0]).teacher["weights"] == section.row("teacher").encoders[0]  # type: ignore[index]

    for key in ("mae", "amd"):
        (folder,) = (run_folder(str(tmp_path), load_card(url).id) for url in section.row(key).encoders)
        assert [found.step for found in media_steps(folder)] == [1, 2, 3]  # for the job's page and the mask lab
    for key in ("teacher", "mae", "amd"):
        with Image.open(section.row(key).pictures[0]) as page:
            assert page.width > 600
    assert report.embedded["width"] == 64
    assert str(report.embedded["file"]).endswith((".png", ".mp4"))
    for expected in (
        "raw pixels",
        "student (64 x 4), AMD",
        "Pictures",
        "Embedding of one file",
        "Runs:",
        str(tmp_path),
    ):
        assert expected in output.getvalue()


def test_a_second_demo_reuses_finished_runs(tmp_path: Path) -> None:
    first = short_demo(tmp_path, io.StringIO(), video=False)
    runs = listdir(str(tmp_path / "runs"))
    second = short_demo(tmp_path, io.StringIO(), video=False)
    assert listdir(str(tmp_path / "runs")) == runs
    assert second.sections == first.sections


def test_each_seed_has_its_own_teacher_and_full_mode_adds_control_runs(tmp_path: Path) -> None:
    report = short_demo(tmp_path, io.StringIO(), video=False, seeds=2, full=True)
    (section,) = report.sections
    keys = ["pixels", "random", "teacher", "mae", "mae-time", "symmetric", "direct", "amd"]
    assert sorted(row.key for row in section.rows) == sorted(keys)
    assert len(section.row("pixels").knn) == 1
    for key in keys[1:]:
        assert len(section.row(key).knn) == 2
    assert len(set(section.row("teacher").encoders)) == 2
    assert len(set(section.row("amd").encoders)) == 2


def test_fine_tuning_compares_random_weights_a_plain_mae_and_an_amd_student(tmp_path: Path) -> None:
    output = io.StringIO()
    (section,) = short_demo(tmp_path, output, video=False, finetuned=True).sections
    assert [row.key for row in section.rows if row.finetuned] == ["random", "mae", "amd"]
    assert all(0 <= row.finetuned[0] <= 100 for row in section.rows if row.finetuned)
    assert "fine-tuned %" in output.getvalue()
    tuned = [load_card(str(tmp_path / "encoders" / name)) for name in listdir(str(tmp_path / "encoders"))]
    starts = {str((card.start or {}).get("id", "")) for card in tuned if card.objective == "finetune"}
    assert len(starts) == 3, "scratch, a student trained without distillation, and an AMD student"


def test_a_failed_run_stops_the_demo_with_its_error_message(tmp_path: Path) -> None:
    failed = RunResult(state="failed", message="the disk is full", run_id="x", run_folder="y")
    with pytest.raises(DemoFailed, match="ended in state failed: the disk is full"):
        short_demo(tmp_path, io.StringIO(), video=False, runner=lambda configs: [failed for _ in configs])


def test_independent_runs_are_passed_to_the_runner_together(tmp_path: Path) -> None:
    batches: list[list[str]] = []

    def runner(configs: Sequence[TrainConfig | FinetuneConfig]) -> list[RunResult]:
        batches.append([str(config.name) for config in configs])
        return in_process(configs)

    report = short_demo(tmp_path, io.StringIO(), runner=runner, full=True)
    arms = [[name.split("-s0-")[0].removeprefix("demo-") for name in batch] for batch in batches]
    assert arms[0] == ["image-amd", "video-amd", "image-mae", "video-mae"]
    control_arms = [arm.rstrip("-0123456789") for arm in arms[1]]
    assert control_arms == [f"{kind}-{arm}" for kind in ("image", "video") for arm in ("mae", "symmetric", "direct")]
    assert [section.key for section in report.sections] == ["image", "video"]
