"""Action detection runs: check the config, launch the run and publish the result. `detect` is the entry point."""

from __future__ import annotations

from typing import Any, NamedTuple

from amd.artifacts.weights import Card, HeadCard, Score, save_encoder
from amd.config import ConfigError, DetectionConfig
from amd.downstream.supervised.detection import report
from amd.downstream.supervised.detection.data import open_data
from amd.downstream.supervised.detection.learner import new_detector
from amd.downstream.supervised.detection.worker import work
from amd.exchange.initialization import StartingPoint, load_starting_point
from amd.models.encoder import Encoder
from amd.presets.pretraining import UNSET
from amd.storage import join
from amd.training.checkpoints.store import CheckpointStore
from amd.training.failures import UploadError
from amd.training.run_folder import RunResult, run_folder, versions
from amd.training.runs.checks import DataFacts, check_counts
from amd.training.runs.kinds import RunKind
from amd.training.runs.launch import launch
from amd.training.runs.teachers import TrainTeacher

FILES = ("train", "val", "boxes", "excluded", "label_map", "evaluated")


class ResolvedDetection(NamedTuple):
    config: DetectionConfig
    start: StartingPoint | None


def detect(config: DetectionConfig, **options: Any) -> RunResult:
    """Train to the end, test the best checkpoint and publish it; `options` are passed to `launch`."""
    return launch(config, DETECTION, **options)


def _check(config: DetectionConfig) -> DataFacts:
    missing = {field: str(getattr(config.data, field)) for field in FILES}
    problems = [
        f"data.{field}: presets contain no data; set data.{field}=<{value.removeprefix(UNSET).strip()}>"
        for field, value in missing.items()
        if value.startswith(UNSET)
    ]
    if config.weights is not None and config.weights.startswith(UNSET):
        required = config.weights.removeprefix(UNSET).strip()
        problems.append(
            f"weights: this preset needs {required}; set weights=<file, URI or encoder id>, or weights=null"
        )
    if problems:
        raise ConfigError(problems)
    data = open_data(config)
    return check_counts(config, len(data.train), data.digest())


def _check_weights(config: DetectionConfig) -> None:
    _start(config)


def _start(config: DetectionConfig) -> StartingPoint | None:
    if config.weights is None:
        return None
    encoder = Encoder(config.encoder, config.clip.grid, config.clip.token_values)
    return load_starting_point(encoder, config.weights, config.storage, config.clip)


def _resolve(config: DetectionConfig, root: str, train: TrainTeacher) -> ResolvedDetection:
    return ResolvedDetection(config, _start(config))


def _publish(config: DetectionConfig, resolved: ResolvedDetection, root: str, run_id: str, data: DataFacts) -> str:
    """Publish the encoder and its head, for `model.load_detector`."""
    folder = run_folder(root, run_id)
    store = CheckpointStore(join(folder, "checkpoints"), config.checkpoint)
    found = store.load_best()
    if found is None or store.committed()[-1] < data.steps:
        raise UploadError(f"the last checkpoint of {run_id} is not the final one; start the run again to finish it")
    (best, snapshot), start = found, resolved.start
    opened = open_data(config)
    detector = new_detector(config, opened.label_map.classes)
    detector.load_state_dict(snapshot.tensors["model"])
    tested = report.read_result(join(folder, "test"))
    if tested is not None and tested["step"] != best:
        raise UploadError(
            f"step {tested['step']} of {run_id} was tested but can no longer be read; start the run again"
        )
    card = Card(
        id=run_id,
        encoder=config.encoder,
        clip=config.clip,
        interpolation=config.data.interpolation,
        head=HeadCard(classes=opened.label_map.classes, multi_label=True, labels=opened.label_map.labels()),
        run=run_id,
        objective="detection",
        steps=best,
        start=None if start is None else start.lineage,
        weights_license=config.weights_license or (start.weights_license if start else None),
        data={"train": config.data.train, "samples": data.samples, "digest": opened.train.digest()},
        config=config.model_dump(mode="json"),
        versions=versions(),
        scores=() if tested is None else (_score(tested, run_id),),
    )
    published = join(root, "encoders", run_id)
    save_encoder(published, detector.encoder, card, detector.head)
    return published


def _score(tested: dict[str, Any], run_id: str) -> Score:
    return Score(
        protocol="detection",
        data=tested["data"],
        digest=tested["digest"],
        samples=tested["samples"],
        values=tested["figures"],
        settings={name: tested[name] for name in ("boxes", "size", "unreadable", "step")},
        run=run_id,
    )


DETECTION = RunKind("detect", _check, _check_weights, _resolve, work, _publish)
