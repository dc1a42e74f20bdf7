"""The end of a run: its student's encoder, published with a card that says where it came from."""

from __future__ import annotations

from typing import Any

from amd.artifacts import Card, save_encoder
from amd.config import TrainConfig
from amd.models.encoder import Encoder
from amd.storage import join
from amd.training.checkpoints import CheckpointStore
from amd.training.checks import DataFacts
from amd.training.failures import UploadError
from amd.training.run import run_folder, versions
from amd.training.teachers import ResolvedTeacher

ENCODER = "encoder."


def publish(config: TrainConfig, teacher: ResolvedTeacher, root: str, run_id: str, data: DataFacts) -> str:
    """Write the encoder of a finished run to `<root>/encoders/<run id>`; the folder's URL.

    Reads it from the last checkpoint, so it can be done again at any time, by any process.
    """
    store = CheckpointStore(join(run_folder(root, run_id), "checkpoints"), config.checkpoint)
    found = store.load_newest()
    if found is None or found[0] < data.steps:
        raise UploadError(f"the last checkpoint of {run_id} is not at its end; start the run again to finish it")
    state = found[1].tensors["model"]
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
    encoder.load_state_dict(
        {key.removeprefix(ENCODER): value for key, value in state.items() if key.startswith(ENCODER)}
    )
    folder = join(root, "encoders", run_id)
    card = Card(
        id=run_id,
        encoder=config.student.encoder,
        clip=config.clip,
        interpolation=config.data.interpolation,
        final_norm=config.objective.weights.reconstruction > 0,
        run=run_id,
        objective=config.objective.kind,
        steps=data.steps,
        teacher=_teacher_facts(config, teacher),
        weights_license=teacher.license,
        data={"train": config.data.train, "samples": data.samples, "digest": data.digest},
        config=config.model_dump(mode="json"),
        versions=versions(),
    )
    save_encoder(folder, encoder, card)
    return folder


def _teacher_facts(config: TrainConfig, teacher: ResolvedTeacher) -> dict[str, Any] | None:
    if config.teacher is None or teacher.config.teacher is None:
        return None
    return {
        "weights": teacher.config.teacher.weights,
        "preset": config.teacher.preset,
        "run": teacher.parent,
        "encoder": config.teacher.encoder.model_dump(mode="json"),
    }
