"""Resolve a request to the training config to visualise and the unmodified config to compare it with."""

from __future__ import annotations

from typing import Any, NamedTuple

from amd.artifacts.card import Card
from amd.config import ConfigError, TrainConfig, validate, with_overrides
from amd.presets.load import find_preset
from service.auth.isolation import LocationPolicy
from service.db.models import Job
from service.jobs.store import JobStore
from service.lab.schemas import LabOptions
from service.registry.store import EncoderStore
from service.web.errors import Refusal

TIMM = "timm:"  # prefix of weights on the hub
DEFAULT_PRESET = "demo-image-amd"  # needs neither data nor weights
MAX_BATCH_CELLS = 2**23  # maximum number of cells in a batch, all sampled to draw one clip
MAX_TOKENS, MAX_PIXELS = 2**14, 2**24  # per clip
OVERRIDES = {
    "student_ratio": "mask.student_ratio",
    "teacher_ratio": "mask.teacher_ratio",
    "strategy": "mask.strategy",
    "decoder": "mask.decoder",
    "decoder_ratio": "mask.decoder_ratio",
    "seed": "seed",
    "batch_size": "optim.batch_size",
}


class LabSource(NamedTuple):
    """The training config that a request shows, and where it comes from."""

    config: TrainConfig
    """Config with the requested mask settings."""
    baseline: TrainConfig
    """Config of the preset, job or encoder."""
    preset: str | None
    job: Job | None
    encoder: str | None
    """ID of the encoder."""


def resolve_source(options: LabOptions, jobs: JobStore, encoders: EncoderStore, project: str | None) -> LabSource:
    """Return the source of a request.

    Raises ConfigError for invalid settings or an unknown preset, NotFound for an unknown job or encoder, or Refusal if
    the options are incompatible or the clip or batch is too large.
    """
    if options.preset is not None and options.encoder is not None:
        raise Refusal("not_possible", "preset and encoder both determine the config; set one of them")
    job = jobs.get(options.job, project) if options.job is not None else None
    if job is not None and job.kind != "train":
        raise Refusal("not_possible", f"{job.id} is a {job.kind} job without mask settings; use a train job")
    if options.record is not None and job is None:
        raise Refusal("not_possible", "record selects a sample from a job's data; set job, too")
    if options.checkpoint is not None and (job is None or options.encoder is not None or options.preset is not None):
        raise Refusal(
            "not_possible", "checkpoint belongs to a job and its config; set job, and neither encoder nor preset"
        )
    if options.alignment and options.checkpoint is None:
        raise Refusal(
            "not_possible", "alignment needs a student's projections, which only checkpoints have; set checkpoint"
        )
    preset: str | None = None
    encoder: str | None = None
    if options.encoder is not None:
        row = encoders.resolve(options.encoder, project)
        encoder, baseline = row.id, _config_of(Card.model_validate(row.card))
    elif job is not None and options.preset is None:
        baseline = validate(TrainConfig, job.config)
    else:
        preset = options.preset or DEFAULT_PRESET
        baseline = find_preset(TrainConfig, preset).config
    # The masks of a batch do not depend on the number of workers, which would restrict the batch size.
    baseline = with_overrides(baseline, {"scaling.workers": 1})
    values: dict[str, Any] = {key: getattr(options, name) for name, key in OVERRIDES.items()}
    config = with_overrides(baseline, {key: value for key, value in values.items() if value is not None})
    _check_size(config)
    return LabSource(config, baseline, preset, job, encoder)


def check_teacher(config: TrainConfig, policy: LocationPolicy, project: str) -> None:
    """Check that the lab may load the teacher of a project's job.

    A job that has ended does not protect its teacher, so another project may have published one with the same ID since.
    Raises Refusal if there is no teacher or its weights are on the hub, and UriNotAllowed or NotFound if the project
    may not read the weights.
    """
    if config.teacher is None:
        raise Refusal("not_possible", "alignment: the job has no teacher; use a job with objective.kind=amd")
    weights = config.teacher.weights
    if weights is not None and weights.startswith(TIMM):
        message = f"teacher.weights={weights}: the lab does not download weights from the hub; omit `alignment`"
        raise Refusal("not_possible", message)
    if weights is not None:
        policy.check("teacher.weights", weights, project)


def _config_of(card: Card) -> TrainConfig:
    """Return the config that an encoder was trained with. Raises Refusal if it cannot reconstruct pixels."""
    if card.decoder is None:
        message = f"{card.id} was published without its decoder, so it cannot reconstruct pixels; omit `encoder`"
        raise Refusal("not_possible", message)
    try:
        return validate(TrainConfig, card.config)
    except ConfigError as error:
        raise Refusal("not_possible", f"{card.id}: its card has no valid training config: {error}") from None


def _check_size(config: TrainConfig) -> None:
    """Raise Refusal for a clip or a batch that would take too long to draw."""
    clip, cells = config.clip, config.clips_per_step * config.cells
    pixels = clip.frames * clip.size[0] * clip.size[1]
    if clip.grid.tokens > MAX_TOKENS or pixels > MAX_PIXELS:
        raise Refusal(
            "not_possible",
            f"a clip of {clip.grid.tokens} tokens and {pixels} pixels exceeds the lab's limit of {MAX_TOKENS} tokens "
            f"and {MAX_PIXELS} pixels; use a config with smaller clips",
        )
    if cells > MAX_BATCH_CELLS:
        raise Refusal(
            "not_possible",
            f"a batch of {config.clips_per_step} clips x {config.cells} cells exceeds the lab's limit of "
            f"{MAX_BATCH_CELLS} cells; lower batch_size",
        )
