"""Pre-training on one rank: the training loop with student, teacher and collapse guard."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from amd.config import TrainConfig
from amd.data.loading.loader import Batch
from amd.device import autocast
from amd.exchange.load import load_teacher
from amd.flops import step_flops
from amd.training.process_group import ProcessGroup
from amd.training.reporting.media_writer import MediaWriter, picture_steps
from amd.training.reporting.metrics import StepImages
from amd.training.reporting.prober import is_probed
from amd.training.run_folder import RunSpec
from amd.training.trainer import collapse_guard
from amd.training.trainer.distiller import Distiller
from amd.training.trainer.loop import Training
from amd.training.trainer.run_hooks import LoopResult, RunHooks

GUARDED_CLIPS = 256


def work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Resume from the newest checkpoint and train until the run ends or is stopped.

    Raises NonFinite, DataFault or UploadError; failures that affect all ranks are raised on all of them.
    """
    return Pretraining(spec, group, hooks).run()


class Pretraining(Training):
    learner: Distiller

    def __init__(
        self, spec: RunSpec, group: ProcessGroup, hooks: RunHooks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config = spec.parsed(TrainConfig)
        super().__init__(spec, config, group, hooks, clock)
        self.learner = Distiller(config, group, load_teacher(config) if config.teacher is not None else None)
        self.picture_steps = frozenset(picture_steps(config, self.steps, self.loader.steps_per_epoch))
        self.media: MediaWriter | None = None  # only on rank 0, if there are pictures to write
        if group.is_main and self.picture_steps:
            student = self.learner.student
            self.media = MediaWriter(spec.folder, config, student, self.manifest, self._track_images)

    def flops_per_clip(self) -> float:
        return float(step_flops(self.config).total)

    def start_facts(self) -> dict[str, Any]:
        sets = self.learner.token_sets(0)
        visible = {"student": sets.student_visible.shape[1]}
        if self.learner.teacher is not None:
            visible["teacher"] = sets.student_visible.shape[1] + sets.teacher_only.shape[1]
        return {"visible_tokens": visible}

    def is_checkpoint_due(self, done: int) -> bool:
        """Return whether a probe is due, because probes read checkpoints."""
        probe = self.config.probe
        return probe is not None and is_probed(done, self.steps, self.loader.steps_per_epoch, probe.every_epochs)

    def after_step(self, done: int, batches: list[Batch]) -> None:
        if self.media is not None:
            if done in self.picture_steps:
                self.media.write(done, self.learner.student)
            self._warn_about_pictures(self.media)
        self._guard(done, batches)

    def close_reports(self, wait: bool) -> None:
        if self.media is not None:
            self.media.close(wait)
            self._warn_about_pictures(self.media)

    def _warn_about_pictures(self, media: MediaWriter) -> None:
        for text in media.warnings():
            self.emit("warning", text=text)

    def _track_images(self, images: StepImages) -> None:
        if self.metrics is not None:
            self.metrics.write_images(images)

    def _guard(self, done: int, batches: list[Batch]) -> None:
        """Run the collapse guard on rank 0, using that rank's clips."""
        tracking, learner = self.config.tracking, self.learner
        if self.metrics is None or not tracking.guard_every_steps or done % tracking.guard_every_steps:
            return
        clips = torch.cat([batch.clips for batch in batches])[:GUARDED_CLIPS].to(learner.device)
        sets = learner.token_sets(done - 1).rows(0, len(clips))
        with autocast(learner.precision, learner.device):
            features = collapse_guard.student_features(learner.student.encoder, clips, sets, self.config)
        health = collapse_guard.feature_health(features)
        self.write_metrics(done, {"guard/feature_rank": health.rank, "guard/feature_spread": health.spread})
        text = collapse_guard.warning(health, done, tracking.guard_min_rank)
        if text is not None:
            self.emit("warning", text=text)
