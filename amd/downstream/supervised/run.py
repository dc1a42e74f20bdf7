"""Supervised runs: check the config, load the initial weights, and publish the tested checkpoint with its score."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from amd.artifacts.weights import Card, Score, save_encoder
from amd.config import with_overrides
from amd.downstream.supervised.learner import SupervisedConfig, load_start
from amd.downstream.supervised.report import TEST, read_result
from amd.downstream.supervised.task import SupervisedTask
from amd.exchange.initialization import StartingPoint
from amd.models.encoder import Encoder
from amd.presets.load import check_complete
from amd.storage import join
from amd.training.checkpoints.store import CheckpointStore
from amd.training.failures import UploadError
from amd.training.run_folder import run_folder, versions
from amd.training.runs.checks import DataFacts, check_counts
from amd.training.runs.kinds import RunKind, Work
from amd.training.runs.teachers import TrainTeacher

SELECTION = ("checkpoint", "selected_on_test")  # how the tested checkpoint was chosen


class ResolvedSupervised(NamedTuple):
    config: SupervisedConfig
    """Config with values filled in from the data and the initial weights."""
    start: StartingPoint | None


def supervised_kind(task: type[SupervisedTask], work: Work) -> RunKind:
    """Return the RunKind that `launch` needs to train a task."""
    return RunKind(
        task.name,
        check=partial(_check, task),
        check_weights=partial(_load_start, task),
        resolve=partial(_resolve, task),
        work=work,
        publish=partial(_publish, task),
    )


def _check(task: type[SupervisedTask], config: SupervisedConfig) -> DataFacts:
    check_complete(config)
    opened = task(config)
    facts = check_counts(config, len(opened.train), opened.digest())
    opened.check()
    return facts


def _load_start(task: type[SupervisedTask], config: SupervisedConfig) -> StartingPoint | None:
    encoder = Encoder(config.encoder, config.clip.grid, config.clip.token_values)
    return load_start(encoder, config, final_norm=task.final_norm)


def _resolve(
    task: type[SupervisedTask], config: SupervisedConfig, root: str, train: TrainTeacher
) -> ResolvedSupervised:
    start = _load_start(task, config)
    completed = task(config).completed_config()
    if start is not None and start.position_grid is not None:
        completed = with_overrides(completed, {"encoder.position_grid": start.position_grid})
    return ResolvedSupervised(completed, start)


def _publish(
    task: type[SupervisedTask],
    config: SupervisedConfig,
    resolved: ResolvedSupervised,
    root: str,
    run_id: str,
    data: DataFacts,
) -> str:
    """Publish the encoder and head of the best or last checkpoint; return the folder's URL."""
    folder = run_folder(root, run_id)
    store = CheckpointStore(join(folder, "checkpoints"), config.checkpoint)
    if data.steps not in store.committed():
        raise UploadError(
            f"the newest checkpoint of {run_id} is not from its final step; start the run again to finish it"
        )
    config, start = resolved.config, resolved.start
    opened = task(config)
    found = opened.load_tested(store, data.steps)
    if found is None:
        raise UploadError(f"no checkpoint of {run_id} can be read; start the run again")
    step, snapshot = found
    network = opened.restore(snapshot.tensors)
    tested = read_result(join(folder, TEST))
    if tested is not None and tested["step"] != step:
        raise UploadError(
            f"step {tested['step']} of {run_id} was tested, but its checkpoint can no longer be read; "
            "start the run again"
        )
    card = Card(
        id=run_id,
        encoder=config.encoder,
        clip=config.clip,
        interpolation=config.data.interpolation,
        pooling=task.pooling,
        head=opened.head_card(),
        run=run_id,
        objective=task.objective,
        steps=step,
        start=None if start is None else start.lineage,
        weights_license=config.weights_license or (start.weights_license if start else None),
        data={"train": config.data.train, "samples": data.samples, "digest": opened.train_digest()},
        config=config.model_dump(mode="json"),
        versions=versions(),
        scores=() if tested is None else (_score(task, tested, run_id),),
    )
    published = join(root, "encoders", run_id)
    save_encoder(published, network.encoder, card, network.head)
    return published


def _score(task: type[SupervisedTask], tested: dict[str, Any], run_id: str) -> Score:
    return Score(
        protocol=task.protocol,
        data=tested["data"],
        digest=tested["digest"],
        samples=tested["samples"],
        views=tested.get("views"),
        values=tested["figures"],
        settings={name: tested[name] for name in (*task.score_settings, *SELECTION) if name in tested},
        run=run_id,
    )
