from __future__ import annotations

import builtins
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from amd.config import ConfigError, TrackingConfig
from amd.storage import StorageUnreachable, join, listdir
from amd.training.failures import classify_failure
from amd.training.reporting.metrics import ChunkSink, MetricsWriter, StepImages, check_mlflow, open_metrics
from amd.training.reporting.metrics_reader import read_metrics


def line(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 3, "time": 1e9 + step, "loss/total": loss}


@pytest.fixture(params=["local", "s3"])
def run_folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_root")
    return join(root, "runs", "one")


def test_chunks_are_never_rewritten_and_the_latest_line_for_a_step_wins(run_folder: str) -> None:
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


class RecordingSink:
    """Records each call and the calling thread; methods listed in `errors` raise the given error."""

    def __init__(self, **errors: Exception) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.threads: set[threading.Thread] = set()
        self.errors = errors
        self.open = threading.Event()  # writing blocks until it is set, as with slow storage
        self.open.set()

    def write(self, line: dict[str, Any]) -> None:
        self._record("write", line["step"])

    def write_images(self, images: StepImages) -> None:
        self._record("write_images", images.step)

    def flush(self) -> None:
        self._record("flush", None)

    def close(self) -> None:
        self._record("close", None)

    def _record(self, name: str, value: Any) -> None:
        self.open.wait()
        self.threads.add(threading.current_thread())
        self.calls.append((name, value))
        if name in self.errors:
            raise self.errors[name]


def test_slow_sinks_receive_all_lines_in_order_off_the_training_thread() -> None:
    sink = RecordingSink()
    writer = MetricsWriter([sink])
    writer.write(line(0, 9.0))
    writer.flush()
    assert threading.current_thread() not in sink.threads
    sink.open.clear()
    for step in range(1, 100):
        writer.write(line(step, 9.0))
    assert len(sink.calls) == 2, "nothing else has been written yet"
    sink.open.set()
    writer.flush()
    assert sink.calls == [("write", 0), ("flush", None), *(("write", step) for step in range(1, 100)), ("flush", None)]
    writer.close()
    assert sink.calls[-1] == ("close", None)
    assert not any(thread.is_alive() for thread in sink.threads), "close ends the thread"


def test_an_abandoned_run_leaves_no_writer_thread_behind() -> None:
    sink = RecordingSink()
    writer = MetricsWriter([sink])
    writer.write(line(1, 9.0))
    writer.flush()
    for thread in sink.threads:
        thread.join(60)
        assert not thread.is_alive()


def test_writing_blocks_while_too_many_lines_are_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricsWriter, "MAX_WAITING", 3)
    sink = RecordingSink()
    writer = MetricsWriter([sink])
    sink.open.clear()
    written: list[int] = []

    def train() -> None:
        for step in range(20):
            writer.write(line(step, 9.0))
            written.append(step)

    training = threading.Thread(target=train)
    training.start()
    training.join(0.2)
    assert training.is_alive()
    assert len(written) <= 4, "three lines wait, one is being written"
    sink.open.set()
    training.join(60)
    writer.close()
    assert [step for name, step in sink.calls if name == "write"] == list(range(20))


@pytest.mark.parametrize("call", ["write", "flush", "close"])
def test_a_sink_error_is_raised_in_the_run(call: str) -> None:
    error = StorageUnreachable("s3://runs/metrics/000001.jsonl: the store has not responded")
    writer = MetricsWriter([RecordingSink(**{call: error})])

    def train() -> None:
        writer.write(line(1, 9.0))
        writer.flush()
        writer.close()

    with pytest.raises(StorageUnreachable) as raised:
        train()
    assert classify_failure([raised.value]).reason == "storage_unreachable"


def test_pictures_reach_every_sink_and_picture_errors_never_fail_the_run() -> None:
    broken, healthy = RecordingSink(write_images=OSError("no space left on device")), RecordingSink()
    writer = MetricsWriter([broken, healthy])
    writer.write_images(StepImages(3, {}))
    writer.write(line(4, 9.0))
    writer.close()
    assert broken.calls == healthy.calls == [("write_images", 3), ("write", 4), ("close", None)]


def test_pictures_are_dropped_while_too_many_calls_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricsWriter, "MAX_WAITING", 2)
    sink = RecordingSink()
    writer = MetricsWriter([sink])
    sink.open.clear()
    for step in range(10):
        writer.write_images(StepImages(step, {}))
    sink.open.set()
    writer.close()
    assert 2 <= len([name for name, _ in sink.calls if name == "write_images"]) <= 3


def test_writing_pictures_does_not_hide_an_earlier_write_error() -> None:
    sink = RecordingSink(write=StorageUnreachable("the store has not responded"))
    writer = MetricsWriter([sink])
    writer.write(line(1, 9.0))
    for thread in threading.enumerate():
        if thread.name == "metrics":
            thread.join(60)
    writer.write_images(StepImages(1, {}))
    with pytest.raises(StorageUnreachable):
        writer.flush()


def test_tensorboard_and_mlflow_receive_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking = TrackingConfig(mlflow=f"file:{tmp_path}/mlruns")
    metrics = open_metrics(str(tmp_path / "run"), "one", tracking, {}, from_step=0)
    metrics.write_images(StepImages(7, {"media/rebuilt": Image.new("RGB", (6, 4), "red")}))
    metrics.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (event,) = events.Images("media/rebuilt")
    assert (event.step, event.width, event.height) == (7, 6, 4)
    client = mlflow.MlflowClient(tracking_uri=tracking.mlflow)
    (run,) = client.search_runs([client.get_experiment_by_name("amd").experiment_id])
    names = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert any("media~rebuilt+step+7" in name and name.endswith(".png") for name in names)


def test_a_flush_waits_until_every_line_is_stored(run_folder: str) -> None:
    metrics = open_metrics(run_folder, "one", TrackingConfig(tensorboard=False), {}, from_step=0)
    for step in (1, 2, 3):
        metrics.write(line(step, 9.0 - step))
    metrics.flush()
    assert [line["step"] for line in read_metrics(run_folder)] == [1, 2, 3]
    metrics.write(line(4, 5.0))
    metrics.close()
    assert listdir(join(run_folder, "metrics")) == ["000000.jsonl", "000001.jsonl"]


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
