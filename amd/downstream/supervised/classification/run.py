"""Fine-tuning runs: check the config, launch the run and publish the result. `finetune` is the entry point."""

from __future__ import annotations

from typing import Any, NamedTuple

from amd.artifacts.weights import Card, HeadCard, Score, save_encoder
from amd.config import ConfigError, FinetuneConfig, with_overrides
from amd.data.loading.rand_augment import check_rand_augment
from amd.downstream.supervised.classification import report
from amd.downstream.supervised.classification.data import check_splits, count_classes, open_splits
from amd.downstream.supervised.classification.learner import load_eval_weights, new_classifier
from amd.downstream.supervised.classification.worker import work
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


class ResolvedFinetuning(NamedTuple):
    config: FinetuneConfig
    """Config with the number of classes filled in."""
    start: StartingPoint | None


def finetune(config: FinetuneConfig, **options: Any) -> RunResult:
    """Fine-tune to the end, test the best checkpoint and publish it; `options` are passed to `launch`."""
    return launch(config, FINETUNING, **options)


def _check(config: FinetuneConfig) -> DataFacts:
    problems = []
    if config.data.train.startswith(UNSET):
        problems.append("data.train: presets contain no data; set data.train=<folder, list file or tar shards>")
    if config.weights is not None and config.weights.startswith(UNSET):
        required = config.weights.removeprefix(UNSET).strip()
        problems.append(
            f"weights: this preset needs {required}; set weights=<file, URI or encoder id>, or weights=null"
        )
    if problems:
        raise ConfigError(problems)
    check_rand_augment(config.data.rand_augment)
    splits = open_splits(config)
    train = splits["data.train"].manifest
    facts = check_counts(config, len(train), "-".join(split.digest() for split in splits.values()))
    check_splits(config, splits)
    return facts


def _check_weights(config: FinetuneConfig) -> None:
    _start(config)


def _start(config: FinetuneConfig) -> StartingPoint | None:
    if config.weights is None:
        return None
    encoder = Encoder(config.encoder, config.clip.grid, config.clip.token_values)
    return load_starting_point(encoder, config.weights, config.storage, config.clip, final_norm=False)


def _resolve(config: FinetuneConfig, root: str, train: TrainTeacher) -> ResolvedFinetuning:
    counted = count_classes(config, open_splits(config)["data.train"])
    return ResolvedFinetuning(with_overrides(config, {"head.classes": counted}), _start(config))


def _publish(config: FinetuneConfig, resolved: ResolvedFinetuning, root: str, run_id: str, data: DataFacts) -> str:
    folder = run_folder(root, run_id)
    store = CheckpointStore(join(folder, "checkpoints"), config.checkpoint)
    found = store.load_best()
    if found is None or store.committed()[-1] < data.steps:
        raise UploadError(f"the last checkpoint of {run_id} is not the final one; start the run again to finish it")
    (best, snapshot), config = found, resolved.config
    classifier = new_classifier(config)
    load_eval_weights(classifier, snapshot.tensors)
    train, start = open_splits(config)["data.train"], resolved.start
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
        pooling="mean_then_norm",
        head=HeadCard(
            classes=classifier.head.out_features,
            multi_label=config.head.multi_label,
            labels=train.names,
        ),
        run=run_id,
        objective="finetune",
        steps=best,
        start=None if start is None else start.lineage,
        weights_license=config.weights_license or (start.weights_license if start else None),
        data={"train": config.data.train, "samples": data.samples, "digest": train.digest()},
        config=config.model_dump(mode="json"),
        versions=versions(),
        scores=() if tested is None else (_score(tested, run_id),),
    )
    published = join(root, "encoders", run_id)
    save_encoder(published, classifier.encoder, card, classifier.head)
    return published


def _score(tested: dict[str, Any], run_id: str) -> Score:
    return Score(
        protocol="test",
        data=tested["data"],
        digest=tested["digest"],
        samples=tested["samples"],
        views=tested["views"],
        values=tested["figures"],
        settings={"sampling": tested["sampling"], "unreadable": tested["unreadable"], "step": tested["step"]},
        run=run_id,
    )


FINETUNING = RunKind("finetune", _check, _check_weights, _resolve, work, _publish)
