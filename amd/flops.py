"""FLOPs of a step, counted from the config alone: what `speed/mfu`, `amd bench` and `amd validate` divide by.

One multiply-add counts 2. A backward pass costs twice its forward pass; no gradient goes to pixels, so that of the
embedding costs one.
Norms, activations and softmax are left out, as is usual.
"""

from __future__ import annotations

from typing import NamedTuple

from amd.config import EncoderConfig, TrainConfig


class StepFlops(NamedTuple):
    """FLOPs per clip, forward and backward where a part is trained."""

    teacher: float
    student: float
    projections: float
    generators: float
    decoder: float

    @property
    def total(self) -> float:
        return sum(self)


def block_flops(tokens: int, asked: int, width: int, mlp_ratio: float) -> float:
    """Forward pass of one block over `tokens`, of which only `asked` are computed to the end."""
    keys_values = 4 * width**2 * tokens
    queries_output_mlp = (4 + 4 * mlp_ratio) * width**2 * asked
    attention = 4 * asked * tokens * width
    return keys_values + queries_output_mlp + attention


def encoder_flops(
    config: EncoderConfig, tokens: int, token_values: int, blocks: int | None = None
) -> tuple[float, float]:
    """Forward pass over `tokens`: (embedding, blocks)."""
    length = tokens + int(config.class_token)
    depth = config.depth if blocks is None else blocks
    return 2.0 * tokens * token_values * config.width, depth * block_flops(
        length, length, config.width, config.mlp_ratio
    )


def step_flops(config: TrainConfig) -> StepFlops:
    """FLOPs of one training step per clip."""
    clip, student = config.clip, config.student
    per_cell = clip.grid.tokens // config.cells
    visible = (config.cells - config.student_hidden_cells) * per_cell
    masked = config.student_hidden_cells * per_cell
    rebuilt = masked - int(config.mask.decoder_ratio * masked) if config.mask.decoder == "running_cell" else masked
    embedding, blocks = encoder_flops(student.encoder, visible, clip.token_values)
    ratio = student.encoder.mlp_ratio
    teacher = projections = generators = decoder = 0.0
    if config.teacher is not None:
        wide = config.teacher.encoder
        seen = (config.cells - config.teacher_hidden_cells) * per_cell
        last = max(pair.teacher for pair in config.objective.layers)
        teacher = sum(encoder_flops(wide, seen, clip.token_values, last))
        pairs = len(config.objective.layers)
        projections = 3 * pairs * 2.0 * visible * student.encoder.width * wide.width
        if config.has_generation:
            width, only = config.generator_width, seen - visible
            full = (student.generator.depth - 1) * block_flops(seen, seen, width, ratio)
            maps = 2.0 * seen * width * wide.width if width != wide.width else 0.0  # in for visible, out for the rest
            generators = 3 * pairs * (full + block_flops(seen, only, width, ratio) + maps)
    if config.objective.weights.reconstruction:
        extra = int(student.encoder.class_token)
        length, width = visible + rebuilt + extra, student.decoder.width
        decoder = 3 * (
            2.0 * (visible + extra) * student.encoder.width * width
            + (student.decoder.depth - 1) * block_flops(length, length, width, ratio)
            + block_flops(length, rebuilt, width, ratio)
            + 2.0 * rebuilt * width * clip.token_values
        )
    return StepFlops(teacher, 2 * embedding + 3 * blocks, projections, generators, decoder)
