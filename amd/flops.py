"""FLOPs of a training step, computed from the config alone, for the metric `speed/mfu`, `amd bench` and `amd validate`.

A multiply-add counts as 2 FLOPs. A backward pass costs twice its forward pass, except for the patch embedding, whose
input needs no gradient. Norms, activations and softmax are not counted. Torch-free.
"""

from __future__ import annotations

from typing import NamedTuple

from amd.config import EncoderConfig, TrainConfig


class StepFlops(NamedTuple):
    """FLOPs per clip for each part of the model: forward and backward passes, except for the teacher (forward only)."""

    teacher: float
    student: float
    projections: float
    generators: float
    decoder: float

    @property
    def total(self) -> float:
        return sum(self)


def block_flops(tokens: int, queries: int, width: int, mlp_ratio: float) -> float:
    """Return the FLOPs of one block's forward pass over `tokens` tokens, of which `queries` produce outputs."""
    keys_values = 4 * width**2 * tokens
    queries_output_mlp = (4 + 4 * mlp_ratio) * width**2 * queries
    attention = 4 * queries * tokens * width
    return keys_values + queries_output_mlp + attention


def encoder_flops(
    config: EncoderConfig, tokens: int, token_values: int, blocks: int | None = None
) -> tuple[float, float]:
    """Return the FLOPs of the encoder's forward pass over `tokens` tokens, as (patch embedding, blocks)."""
    length = tokens + int(config.class_token)
    depth = config.depth if blocks is None else blocks
    return 2.0 * tokens * token_values * config.width, depth * block_flops(
        length, length, config.width, config.mlp_ratio
    )


def step_flops(config: TrainConfig) -> StepFlops:
    """Return the FLOPs of one training step per clip."""
    clip, student = config.clip, config.student
    per_cell = clip.grid.tokens // config.cells
    visible = (config.cells - config.student_hidden_cells) * per_cell
    masked = config.student_hidden_cells * per_cell
    reconstructed = (
        masked - int(config.mask.decoder_ratio * masked) if config.mask.decoder == "running_cell" else masked
    )
    embedding, blocks = encoder_flops(student.encoder, visible, clip.token_values)
    ratio = student.encoder.mlp_ratio
    teacher = projections = generators = decoder = 0.0
    if config.teacher is not None:
        wide = config.teacher.encoder
        teacher_visible = (config.cells - config.teacher_hidden_cells) * per_cell
        last = max(pair.teacher for pair in config.objective.layers)
        teacher = sum(encoder_flops(wide, teacher_visible, clip.token_values, last))
        pairs = len(config.objective.layers)
        projections = 3 * pairs * 2.0 * visible * student.encoder.width * wide.width
        if config.has_generation:
            width, only = config.generator_width, teacher_visible - visible
            full = (student.generator.depth - 1) * block_flops(teacher_visible, teacher_visible, width, ratio)
            # Input layer for visible tokens, output layer for the others.
            maps = 2.0 * teacher_visible * width * wide.width if width != wide.width else 0.0
            generators = 3 * pairs * (full + block_flops(teacher_visible, only, width, ratio) + maps)
    if config.objective.weights.reconstruction:
        extra = int(student.encoder.class_token)
        length, width = visible + reconstructed + extra, student.decoder.width
        decoder = 3 * (
            2.0 * (visible + extra) * student.encoder.width * width
            + (student.decoder.depth - 1) * block_flops(length, length, width, ratio)
            + block_flops(length, reconstructed, width, ratio)
            + 2.0 * reconstructed * width * clip.token_values
        )
    return StepFlops(teacher, 2 * embedding + 3 * blocks, projections, generators, decoder)
