"""Estimate a training job's cost from its config alone: parameters, FLOPs, memory and hours. Does not import torch."""

from __future__ import annotations

from amd.config import EncoderConfig, TrainConfig
from amd.flops import step_flops
from amd.presets.preset import ASSUMED_MFU, H100_BF16_FLOPS
from amd.presets.pretraining import PRESETS
from amd.presets.teachers import teacher_recipe
from service.jobs.execution.ray_jobs import Capacity
from service.jobs.kinds import ResourceRequest, resources_of
from service.jobs.schemas import Estimate

H100_BYTES = 80e9
TRAINED_BYTES = 16  # fp32 weights, gradients and AdamW's two moments
FROZEN_BYTES = 4
ACTIVATION_BYTES = 34  # per block, token and channel, in 16 bits (Korthikanti et al. 2022, without attention maps)


def estimate(config: TrainConfig, preset: str | None, capacity: Capacity | None) -> Estimate:
    """Estimate the cost of a training config. `capacity` is None if the cluster is not responding."""
    student = config.student
    trained = encoder_parameters(student.encoder, config.clip.token_values)
    trained += transformer_parameters(student.decoder.width, student.decoder.depth, student.encoder.mlp_ratio)
    frozen = 0
    if config.teacher is not None:
        frozen = encoder_parameters(config.teacher.encoder, config.clip.token_values)
        if config.has_generation:
            width = config.generator_width
            per_pair = transformer_parameters(width, student.generator.depth, student.encoder.mlp_ratio)
            trained += per_pair * len(config.objective.layers)
    flops = step_flops(config).total
    gpu_hours = _gpu_hours(config, preset, flops)
    minimum = resources_of(config)
    memory = _memory(config, trained, frozen)
    return Estimate(
        student_parameters=encoder_parameters(student.encoder, config.clip.token_values),
        teacher_parameters=frozen or None,
        teacher_steps=_teacher_steps(config),
        device=_device(minimum, capacity),
        flops_per_step=flops * config.clips_per_step,
        memory_per_worker_bytes=memory,
        memory_fits=None if capacity is None else memory < (H100_BYTES if capacity.gpus else capacity.memory),
        hours=None if gpu_hours is None else gpu_hours / minimum.workers,
        gpu_hours=gpu_hours,
        feasible=None if capacity is None else _fits(config, capacity),
    )


def _teacher_steps(config: TrainConfig) -> int | None:
    return teacher_recipe(config).schedule.steps if config.trains_teacher else None


def _device(request: ResourceRequest, capacity: Capacity | None) -> str | None:
    if capacity is None:
        return None if request.device == "auto" else request.device
    return request.device_with(capacity.gpus)


def encoder_parameters(config: EncoderConfig, token_values: int) -> int:
    """Count the parameters of a ViT with fixed position embeddings and no head, including biases and norms."""
    width = config.width
    embedding = token_values * width + width + (width if config.class_token else 0)
    return embedding + transformer_parameters(width, config.depth, config.mlp_ratio) + 2 * width


def transformer_parameters(width: int, depth: int, mlp_ratio: float) -> int:
    """Count the parameters of a stack of transformer blocks."""
    attention = 4 * width**2 + 3 * width
    hidden = int(mlp_ratio * width)
    mlp = 2 * width * hidden + hidden + width
    return depth * (attention + mlp + 4 * width)


def _gpu_hours(config: TrainConfig, preset: str | None, flops: float) -> float | None:
    schedule = config.schedule
    if schedule.steps is not None:
        clips = float(schedule.steps * config.clips_per_step)
    elif preset in PRESETS and PRESETS[preset].samples is not None and schedule.epochs is not None:
        clips = float((PRESETS[preset].samples or 0) * schedule.epochs * config.data.repeats)
    else:
        return None
    return clips * flops / (ASSUMED_MFU * H100_BF16_FLOPS) / 3600


def _memory(config: TrainConfig, trained: int, frozen: int) -> float:
    """Estimate memory per worker, in bytes. Counts only the student's activations: the teacher has no backward pass."""
    share = -(-config.optim.batch_size // config.scaling.workers[0])
    clips = min(config.micro_batch, share) * config.data.repeats
    per_cell = config.clip.grid.tokens // config.cells
    visible = (config.cells - config.student_hidden_cells) * per_cell
    student, decoder = config.student.encoder, config.student.decoder
    kept = visible * student.width * student.depth + config.clip.grid.tokens * decoder.width * decoder.depth
    wide = 1 if config.scaling.precision == "bf16" or config.scaling.device == "cuda" else 2
    return float(trained * TRAINED_BYTES + frozen * FROZEN_BYTES + clips * kept * ACTIVATION_BYTES * wide)


def _fits(config: TrainConfig, capacity: Capacity) -> bool:
    minimum = resources_of(config)
    gpus = minimum.workers if minimum.device == "cuda" else 0
    return minimum.cpus <= capacity.cpus and gpus <= capacity.gpus
