from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from amd.config import ConfigError, TrackingConfig
from amd.storage import join, listdir
from amd.training.reporting.metrics import ChunkSink, check_mlflow, open_metrics
from amd.training.reporting.metrics_reader import read_metrics


def line(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 3, "time": 1e9 + step, "loss/total": loss}


@pytest.fixture(params=["local", "s3"])
def run_folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_root")
    return join(root, "runs", "one")


def test_chunks_are_never_rewritten_and_the_latest_line_of_a_step_wins(run_folder: str) -> None:
    first = ChunkSink(run_folder)
    first.write(line(1, 9.0))
    first.flush()
    first.write(line(2, 8.0))
    first.close()
    resumed = ChunkSink(run_folder)  # a run that resumed from step 1
    resumed.write(line(2, 7.0))
    resumed.close()
    assert listdir(join(run_folder, "metrics")) == ["000000.jsonl", "000001.jsonl", "000002.jsonl"]
    assert [(line["step"], line["loss/total"]) for line in read_metrics(run_folder)] == [(1, 9.0), (2, 7.0)]


def test_tensorboard_receives_the_same_values(run_folder: str, tmp_path: Path) -> None:
    metrics = open_metrics(run_folder, "one", TrackingConfig(), {}, from_step=0)
    metrics.write(line(1, 9.0))
    metrics.write(line(2, 8.0))
    metrics.close()
    (name,) = listdir(join(run_folder, "tensorboard"))
    from amd.storage import read_bytes

    (tmp_path / "events").mkdir()
    (tmp_path / "events" / name).write_bytes(read_bytes(join(run_folder, "tensorboard", name)))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [(1, 9.0), (2, 8.0)]


def test_a_resumed_run_continues_the_same_mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking = TrackingConfig(mlflow=f"file:{tmp_path}/mlruns", tensorboard=False)
    for step in (1, 2):
        metrics = open_metrics(str(tmp_path / "run"), "one", tracking, {"optim": {"base_lr": 0.1}}, from_step=step - 1)
        metrics.write(line(step, 9.0 - step))
        metrics.close()
    client = mlflow.MlflowClient(tracking_uri=tracking.mlflow)
    experiment = client.get_experiment_by_name("amd")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params) == ("FINISHED", {"optim.base_lr": "0.1"})
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 8.0), (2, 7.0)]


def test_an_unreachable_mlflow_server_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = TrackingConfig(mlflow="http://127.0.0.1:1", tensorboard=False)
    metrics = open_metrics(str(tmp_path / "run"), "one", tracking, {}, from_step=0)
    metrics.write(line(1, 9.0))
    metrics.close()
    assert "continues without it" in caplog.text
    assert "1 lines were not sent to MLflow" in caplog.text
    assert len(read_metrics(str(tmp_path / "run"))) == 1


def test_tracking_without_mlflow_installed_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original_import = builtins.__import__

    def import_without_mlflow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "mlflow":
            raise ImportError(name)
        return original_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without_mlflow)
    with pytest.raises(ConfigError, match="MLflow is not installed"):
        check_mlflow(TrackingConfig(mlflow="http://127.0.0.1:1"))
    check_mlflow(TrackingConfig())
