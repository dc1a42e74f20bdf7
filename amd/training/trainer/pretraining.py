"""Pre-training on one rank: the loop with student, teacher and the collapse guard."""

from __future__ import annotations

from typing import Any

import torch

from amd.config import TrainConfig
from amd.data.loading.loader import Batch
from amd.device import autocast
from amd.exchange.load import load_teacher
from amd.flops import step_flops
from amd.training.process_group import Team
from amd.training.reporting.prober import is_probed
from amd.training.run_folder import RunSpec
from amd.training.trainer import collapse_guard
from amd.training.trainer.distiller import Distiller
from amd.training.trainer.loop import Edge, Event, Outcome, Training

__all__ = ["Edge", "Event", "Outcome", "work"]

GUARDED_CLIPS = 256


def work(spec: RunSpec, team: Team, edge: Edge) -> Outcome:
    """Train from the newest checkpoint to the end, or to a stop.

    Raises NonFinite, DataFault or UploadError; a reason that concerns all ranks is raised on all of them.
    """
    return Pretraining(spec, team, edge).run()


class Pretraining(Training):
    learner: Distiller

    def __init__(self, spec: RunSpec, team: Team, edge: Edge) -> None:
        self.config = config = spec.parsed(TrainConfig)
        super().__init__(spec, config, team, edge)
        self.learner = Distiller(config, team, load_teacher(config) if config.teacher is not None else None)

    def flops_per_clip(self) -> float:
        return float(step_flops(self.config).total)

    def introduction(self) -> dict[str, Any]:
        sets = self.learner.token_sets(0)
        seen = {"student": sets.student_visible.shape[1]}
        if self.learner.teacher is not None:
            seen["teacher"] = sets.student_visible.shape[1] + sets.teacher_only.shape[1]
        return {"tokens_seen": seen}

    def wants_checkpoint(self, done: int) -> bool:
        """Probes read checkpoints."""
        probe = self.config.probe
        return probe is not None and is_probed(done, self.steps, self.loader.steps_per_epoch, probe.every_epochs)

    def examine(self, done: int, batches: list[Batch]) -> None:
        """The collapse guard: rank 0 measures its own clips and speaks for all."""
        tracking, learner = self.config.tracking, self.learner
        if self.metrics is None or not tracking.guard_every_steps or done % tracking.guard_every_steps:
            return
        clips = torch.cat([batch.clips for batch in batches])[:GUARDED_CLIPS].to(learner.device)
        sets = learner.token_sets(done - 1).rows(0, len(clips))
        with autocast(learner.precision, learner.device):
            features = collapse_guard.student_features(learner.student.encoder, clips, sets, self.config)
        health = collapse_guard.feature_health(features)
        self.note(done, {"guard/feature_rank": health.rank, "guard/feature_spread": health.spread})
        text = collapse_guard.warning(health, done, tracking.guard_min_rank)
        if text is not None:
            self.tell("warning", text=text)
