"""Publish the encoder and decoder of a finished run's student, with a card that records their origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amd.artifacts.weights import Card, DecoderCard, save_encoder
from amd.config import TrainConfig
from amd.models.encoder import Encoder
from amd.models.predictor import Decoder
from amd.storage import join
from amd.training.checkpoints.store import CheckpointStore
from amd.training.failures import UploadError
from amd.training.run_folder import run_folder, versions
from amd.training.runs.checks import DataFacts
from amd.training.runs.teachers import ResolvedTeacher

ENCODER, DECODER = "encoder.", "decoder."


def publish(config: TrainConfig, teacher: ResolvedTeacher, root: str, run_id: str, data: DataFacts) -> str:
    """Write the encoder of a finished run to `<root>/encoders/<run id>` and return the folder's URL.

    Reads only the last checkpoint, so any process can call this again at any time. Raises UploadError if the run is not
    finished.
    """
    store = CheckpointStore(join(run_folder(root, run_id), "checkpoints"), config.checkpoint)
    found = store.load_newest()
    if found is None or found[0] < data.steps:
        raise UploadError(
            f"the newest checkpoint of {run_id} is not from its final step; start the run again to finish it"
        )
    state = found[1].tensors["model"]
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
    encoder.load_state_dict(_part(state, ENCODER))
    decoder = None
    if config.objective.weights.reconstruction:  # otherwise the student has no decoder
        decoder = Decoder(encoder.config, config.student.decoder, config.clip.grid, config.clip.token_values)
        decoder.load_state_dict(_part(state, DECODER))
    folder = join(root, "encoders", run_id)
    card = Card(
        id=run_id,
        encoder=config.student.encoder,
        clip=config.clip,
        interpolation=config.data.interpolation,
        final_norm=config.objective.weights.reconstruction > 0,
        decoder=_decoder_card(config),
        run=run_id,
        objective=config.objective.kind,
        steps=data.steps,
        teacher=_teacher_facts(config, teacher),
        weights_license=teacher.license,
        data={"train": config.data.train, "samples": data.samples, "digest": data.digest},
        config=config.model_dump(mode="json"),
        versions=versions(),
    )
    save_encoder(folder, encoder, card, decoder=decoder)
    return folder


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _decoder_card(config: TrainConfig) -> DecoderCard | None:
    if not config.objective.weights.reconstruction:
        return None
    return DecoderCard(
        network=config.student.decoder,
        mask_strategy=config.mask.strategy,
        mask_ratio=config.mask.student_ratio,
        pixels=config.objective.pixels,
    )


def _teacher_facts(config: TrainConfig, teacher: ResolvedTeacher) -> dict[str, Any] | None:
    if config.teacher is None or teacher.config.teacher is None:
        return None
    return {
        "weights": teacher.config.teacher.weights,
        "preset": config.teacher.preset,
        "run": teacher.parent,
        "encoder": config.teacher.encoder.model_dump(mode="json"),
    }
