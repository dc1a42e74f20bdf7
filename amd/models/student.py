"""The student: encoder, projections, generators and decoder, which are trained together.

Parts without a loss term are not built, so every parameter receives a gradient in every step. Depends on the teacher
only through its width.
Shapes: B batch, V student-visible, O teacher-only, R reconstructed, P pixel values per token, E teacher width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from amd.config import TrainConfig
from amd.models.encoder import Encoder
from amd.models.layers import init_weights
from amd.models.predictor import Decoder, Generator, Predictor
from amd.tokens import TokenSets


class StudentOutput(NamedTuple):
    """Predictions of the student, one per loss term."""

    reconstructed: Tensor | None  # (B, R, P) pixels; None if reconstruction has weight 0
    projected: list[Tensor]  # (B, V, E) per layer pair, at student-visible tokens
    generated: list[Tensor]  # (B, O, E) per layer pair, at teacher-only tokens; empty without generation alignment


class Student(nn.Module):
    """Encoder, decoder, and one projection and generator per layer pair."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        student, grid, values = config.student, config.clip.grid, config.clip.token_values
        self.encoder = Encoder(student.encoder, grid, values)
        self.aligned_blocks: tuple[int, ...] = ()
        self.projections = nn.ModuleList()
        self.generators = nn.ModuleList()
        if config.objective.kind == "amd":
            assert config.teacher is not None, "validated: amd has a teacher"
            width = config.teacher.encoder.width
            self.aligned_blocks = tuple(pair.student for pair in config.objective.layers)
            # One projection per aligned block, shared by direct and generation alignment, as in the paper.
            self.projections.extend(nn.Linear(student.encoder.width, width, bias=False) for _ in self.aligned_blocks)
            init_weights(self.projections, student.encoder.init)
            if config.has_generation:
                self.generators.extend(_generator(config) for _ in self.aligned_blocks)
        self.decoder: Decoder | None = None
        if config.objective.weights.reconstruction:
            self.decoder = Decoder(student.encoder, student.decoder, grid, values)
        else:
            self.encoder.norm.requires_grad_(False)  # only the decoder uses its output

    def forward(self, tokens: Tensor, sets: TokenSets) -> StudentOutput:
        """Return the predictions for normalised student-visible tokens (B, V, P) and the batch's token sets."""
        visible = sets.student_visible
        encoded = self.encoder(tokens, visible, intermediates=self.aligned_blocks, final=self.decoder is not None)
        projected = [
            project(features) for project, features in zip(self.projections, encoded.intermediates, strict=True)
        ]
        # In sequence: a generator works on projected features, so its gradient reaches the encoder through them.
        generators = self.generators if sets.teacher_only.shape[1] else ()  # other mask ratios may leave none
        generated = [
            generate(features, visible, sets.teacher_only)
            for generate, features in zip(generators, projected, strict=False)
        ]
        reconstructed = self.decoder(encoded.final, visible, sets.reconstructed) if self.decoder is not None else None
        return StudentOutput(reconstructed, projected, generated)


def _generator(config: TrainConfig) -> Predictor:
    """Build a generator. If its width equals the teacher's, as in AMD, it needs no input or output projection."""
    assert config.teacher is not None, "validated: amd has a teacher"
    encoder, grid, teacher_width = config.student.encoder, config.clip.grid, config.teacher.encoder.width
    width, depth, heads = config.generator_width, config.student.generator.depth, config.generator_heads
    if width == teacher_width:
        return Predictor(encoder, grid, width, depth, heads)
    return Generator(encoder, grid, teacher_width, width, depth, heads)
