"""The learner for pre-training: student and teacher on one rank.

Token sets are sampled for the whole global batch, and each rank uses its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amd.config import TrainConfig
from amd.data.loading.loader import Batch
from amd.distillation import distill
from amd.losses import LossTerms
from amd.masks import sample_token_sets
from amd.models.student import Student
from amd.models.teachers.frozen import Teacher
from amd.tokens import TokenSets
from amd.training.checkpoints.state import stream_seed
from amd.training.process_group import ProcessGroup
from amd.training.trainer.learner import Learner, compile_blocks, count
from amd.training.trainer.optimizer import build_optimizer


def sample_step_token_sets(config: TrainConfig, step: int, generator: torch.Generator) -> TokenSets:
    """Sample the token sets for a step's global batch as a function of the run's seed and the step.

    Seeds the generator and samples on its device; CPUs and GPUs draw different numbers.
    """
    generator.manual_seed(stream_seed(config.seed, "masks", step))
    return sample_token_sets(config.mask, config.clip.grid, config.clips_per_step, generator)


class Distiller(Learner):
    """Student, frozen teacher and optimizer on one rank."""

    losses = tuple(f"loss/{name}" for name in LossTerms._fields)

    def __init__(self, config: TrainConfig, group: ProcessGroup, teacher: Teacher | None) -> None:
        super().__init__(config, group)
        self.config = config
        self.student = Student(config).to(self.device).train()
        self.network = self.model = self.student
        self.teacher = teacher.to(self.device) if teacher is not None else None
        if self.teacher is not None and self.precision == "bf16":
            self.teacher.cast_linear_layers(torch.bfloat16)
        if config.scaling.compile:
            compile_blocks(self.student)
            if self.teacher is not None:
                compile_blocks(self.teacher)
        self.optimizer = build_optimizer(self.student, config.optim)
        self._generator = torch.Generator(self.device)
        self._sets: TokenSets | None = None

    def begin(self, step: int) -> None:
        super().begin(step)
        self._sets = self.token_sets(step)

    def loss(self, clips: Tensor, batch: Batch, row: int) -> Sequence[Tensor]:
        assert self._sets is not None, "call begin() first"
        return distill(self.model, self.teacher, clips, self._sets.rows(row, row + len(clips)), self.config)

    def token_sets(self, step: int) -> TokenSets:
        """Sample the token sets for the whole global batch."""
        return sample_step_token_sets(self.config, step, self._generator)

    def parameter_counts(self) -> dict[str, int]:
        """Return the parameter counts of the encoder, the whole student, and the teacher."""
        counts = {"encoder": count(self.student.encoder), "student": count(self.student)}
        return counts | ({"teacher": count(self.teacher)} if self.teacher is not None else {})
