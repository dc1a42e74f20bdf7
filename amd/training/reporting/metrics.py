"""Write a run's metrics to MLflow, TensorBoard event files, and immutable JSONL chunks under the storage root.

MLflow and TensorBoard also receive the run's pictures, which `media_writer` renders.

Ray keeps only metrics that are tied to a checkpoint, so runs write their metrics themselves. `metrics_reader`
reads the chunks.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from amd.config import ConfigError, TrackingConfig, flatten
from amd.storage import filesystem, is_remote, join, local_path, write_bytes
from amd.training.reporting.metrics_reader import Line, chunk_names

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class StepImages(NamedTuple):
    """Images of one step, for trackers."""

    step: int
    images: Mapping[str, Image]
    """Images by tag, such as media/rebuilt."""


class MetricsSink(Protocol):
    def write(self, line: Line) -> None: ...
    def write_images(self, images: StepImages) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class ChunkSink:
    """Writes lines to `metrics/NNNNNN.jsonl`: one chunk every `seconds` seconds, and a final one on close."""

    def __init__(self, run_folder: str, seconds: float = 30.0) -> None:
        self._folder = join(run_folder, "metrics")
        self._seconds = seconds
        self._lines: list[Line] = []
        self._number = len(chunk_names(run_folder))
        self._written = time.monotonic()

    def write(self, line: Line) -> None:
        self._lines.append(line)
        if time.monotonic() - self._written >= self._seconds:
            self.flush()

    def write_images(self, images: StepImages) -> None:
        pass

    def flush(self) -> None:
        self._written = time.monotonic()
        if self._lines:
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            write_bytes(join(self._folder, f"{self._number:06d}.jsonl"), text.encode())
            self._number += 1
            self._lines = []

    def close(self) -> None:
        self.flush()


class EventFileSink:
    """Writes event files to `tensorboard/`. On remote storage, they are copied there every few minutes."""

    def __init__(self, run_folder: str, from_step: int, upload_seconds: float = 300.0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self._url = join(run_folder, "tensorboard")
        self._remote = is_remote(run_folder)
        self._local = tempfile.mkdtemp(prefix="amd-tensorboard-") if self._remote else str(local_path(self._url))
        self._writer: Any = SummaryWriter(self._local, purge_step=from_step or None)
        self._seconds, self._uploaded = upload_seconds, time.monotonic()

    def write(self, line: Line) -> None:
        for name, value in _numbers(line):
            self._writer.add_scalar(name, value, line["step"], line["time"])
        if self._remote and time.monotonic() - self._uploaded >= self._seconds:
            self.flush()

    def write_images(self, images: StepImages) -> None:
        import numpy as np

        for name, image in images.images.items():
            self._writer.add_image(name, np.asarray(image), images.step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()
        if self._remote:
            self._uploaded = time.monotonic()
            fs, folder = filesystem(self._url)
            for path in Path(self._local).iterdir():
                fs.put_file(str(path), f"{folder}/{path.name}")

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._remote:
            shutil.rmtree(self._local, ignore_errors=True)


class MLflowSink:
    """Sends metrics to an MLflow run. When training resumes, the run is found on the server by its tag.

    Sends from a separate thread and buffers lines while the server is unavailable, because tracking must never delay or
    stop a run.
    """

    RETRY_S = 30.0
    CLOSE_S = 30.0

    def __init__(self, tracking: TrackingConfig, run_id: str, parameters: dict[str, Any]) -> None:
        # MLflow's own retries take minutes by default.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._tracking, self._run_id, self._parameters = tracking, run_id, parameters
        self._client: Any = None
        self._run = ""
        self._warned = False
        self._lines: deque[Line] = deque(maxlen=100_000)
        self._images: deque[StepImages] = deque(maxlen=100)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, line: Line) -> None:
        self._lines.append(line)
        self._wake.set()

    def write_images(self, images: StepImages) -> None:
        self._images.append(images)
        self._wake.set()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(self.CLOSE_S)
        if self._lines:
            logger.warning("%d lines were not sent to MLflow; they are in the run's metrics folder", len(self._lines))

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            sent = self._send()
            if self._closing.is_set():
                return
            if not sent:
                self._closing.wait(self.RETRY_S)
                self._wake.set()

    def _send(self) -> bool:
        """Send buffered lines; return whether the server accepted them."""
        from mlflow.entities import Metric

        try:
            if not self._run:
                self._run = self._find_or_create()
            while self._lines:
                line = self._lines[0]
                milliseconds = int(line["time"] * 1000)
                batch = [Metric(name, value, milliseconds, line["step"]) for name, value in _numbers(line)]
                self._client.log_batch(self._run, metrics=batch)
                self._lines.popleft()
            while self._images:
                step, images = self._images[0]
                for name, image in images.items():
                    self._client.log_image(self._run, image, key=name, step=step, synchronous=True)
                self._images.popleft()
            if self._closing.is_set():
                self._client.set_terminated(self._run)
        except Exception as error:  # any network or server error
            if not self._warned:
                logger.warning("MLflow does not respond (%s); the run continues without it and will retry", error)
                self._warned = True
            return False
        return True

    def _find_or_create(self) -> str:
        from mlflow import MlflowClient

        self._client = client = MlflowClient(tracking_uri=self._tracking.mlflow)
        name = self._tracking.mlflow_experiment
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        found = client.search_runs([experiment_id], f"tags.`amd.run` = '{self._run_id}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = client.create_run(experiment_id, run_name=self._run_id, tags={"amd.run": self._run_id})
        for key, value in self._parameters.items():
            client.log_param(run.info.run_id, key, str(value)[:500])
        return str(run.info.run_id)


class MetricsWriter:
    """Writes metrics to all of a run's sinks in order, from a separate thread so that slow storage never delays a step.

    If a sink fails, further lines are dropped and the next call raises the error. The thread exits whenever nothing is
    left to write, so a failed run leaves no thread behind. Safe to call from several threads.
    """

    MAX_WAITING = 10_000

    def __init__(self, sinks: list[MetricsSink]) -> None:
        self._sinks = sinks
        self._calls: deque[Callable[[MetricsSink], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def write(self, line: Line) -> None:
        """Queue a line. Blocks only while MAX_WAITING calls are queued."""
        self._submit(lambda sink: sink.write(line))

    def write_images(self, images: StepImages) -> None:
        """Queue images. Never blocks or raises: drops the images if a sink has failed or too many calls are waiting."""

        def write(sink: MetricsSink) -> None:
            try:
                sink.write_images(images)
            except Exception as error:
                logger.warning(
                    "step %d: a tracker did not accept the pictures (%s); training continues", images.step, error
                )

        with self._changed:
            if self._error is None and len(self._calls) < self.MAX_WAITING:
                self._start(write)

    def flush(self) -> None:
        """Wait until all lines are stored."""
        self._submit(lambda sink: sink.flush())
        self._wait()

    def close(self) -> None:
        """Store all lines, close the sinks, and stop the thread."""
        self._submit(lambda sink: sink.close())
        self._wait()

    def _submit(self, call: Callable[[MetricsSink], None]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._calls) < self.MAX_WAITING)
            self._raise_error()
            self._start(call)

    def _start(self, call: Callable[[MetricsSink], None]) -> None:
        self._calls.append(call)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
            self._thread.start()

    def _wait(self) -> None:
        with self._changed:
            thread = self._thread
            self._changed.wait_for(lambda: self._thread is None)
            self._raise_error()
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.notify_all()
                if self._error is not None:
                    self._calls.clear()
                if not self._calls:
                    self._thread = None
                    return
                call = self._calls.popleft()
            try:
                for sink in self._sinks:
                    call(sink)
            except Exception as error:  # raised by the next call, in the training thread
                self._error = error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def open_metrics(run_folder: str, run_id: str, tracking: TrackingConfig, config: Line, from_step: int) -> MetricsWriter:
    """Open the sinks that the config selects; `config` is logged as MLflow parameters with dotted keys."""
    sinks: list[MetricsSink] = [ChunkSink(run_folder)]
    if tracking.tensorboard:
        sinks.append(EventFileSink(run_folder, from_step))
    if tracking.mlflow:
        sinks.append(MLflowSink(tracking, run_id, flatten(config)))
    return MetricsWriter(sinks)


def check_mlflow(tracking: TrackingConfig) -> None:
    """Raise ConfigError if MLflow is configured but not installed."""
    if tracking.mlflow:
        try:
            import mlflow  # noqa: F401
        except ImportError:
            raise ConfigError(
                [f"tracking.mlflow={tracking.mlflow}: MLflow is not installed; pip install 'amd-service[mlflow]'"]
            ) from None


def _numbers(line: Line) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in line.items() if "/" in name)
