"""Action detection on one rank: the training loop, periodic frame-mAP and the final test."""

from __future__ import annotations

from typing import Any

from amd.config import DetectionConfig
from amd.data.loading.loader import ClipLoader, Records
from amd.downstream.supervised.detection import report
from amd.downstream.supervised.detection.augment import TrainingTransform
from amd.downstream.supervised.detection.data import EvaluationSet, open_data, reader_of
from amd.downstream.supervised.detection.evaluation import DetectionScores, predict, score
from amd.downstream.supervised.detection.learner import DetectionLearner, new_detector
from amd.downstream.supervised.detection.model import Detector
from amd.exchange.initialization import load_starting_point
from amd.flops import encoder_flops
from amd.storage import join
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunSpec
from amd.training.trainer.loop import LoopResult, RunHooks, Training

LISTED_KEY_FRAMES = 5  # unreadable key frames listed in a warning


def work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Train from the newest checkpoint and test the best one, unless stopped earlier."""
    return DetectionTraining(spec, group, hooks).run()


class DetectionTraining(Training):
    learner: DetectionLearner

    def __init__(self, spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> None:
        self.config = config = spec.parsed(DetectionConfig)
        self.data = open_data(config)
        super().__init__(spec, config, group, hooks)
        self.actions = self.data.label_map.classes
        start = self._start if config.weights else None
        self.learner = DetectionLearner(config, group, self.actions, start, self.data.train)

    def open_manifest(self) -> Records:
        return self.data.train

    def open_loader(self, **more: Any) -> ClipLoader:
        clip = self.config.clip
        return super().open_loader(
            transform=TrainingTransform(self.config.data, clip), open_reader=reader_of(clip), **more
        )

    def _start(self, detector: Detector) -> None:
        config = self.config
        assert config.weights is not None, "only called for runs with weights"
        load_starting_point(detector.encoder, config.weights, config.storage, config.clip)

    def flops_per_clip(self) -> float:
        """Return three times the FLOPs of a forward pass, twice for the patch embedding, as pixels need no gradient."""
        clip = self.config.clip
        embedding, blocks = encoder_flops(self.config.encoder, clip.grid.tokens, clip.token_values)
        return 2 * embedding + 3 * blocks

    def evaluate(self, done: int) -> dict[str, float]:
        every = self.config.evaluation.every_epochs * self.loader.steps_per_epoch
        val = self.data.val
        if val is None or (done % every and done != self.steps):
            return {}
        scored = self._score(self.learner.detector, val)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scored.figures.items())
        self.emit("note", text=f"step {done}: {shown}")
        return scored.figures

    def finalize(self, done: int) -> dict[str, float]:
        """Test the best checkpoint and write reports to the run's folder."""
        val, group = self.data.val, self.group
        if val is None:
            return {}
        found = self.store.load_best() if group.is_main else None
        best = group.broadcast_from_main(lambda: found[0] if found else 0)
        detector = new_detector(self.config, self.actions)
        detector.load_state_dict((found[1] if found else self.store.load(best)).tensors["model"])
        self.emit("note", text=f"testing step {best} on {len(val.key_frames)} key frames")
        scored = self._score(detector.to(group.device), val)
        if group.is_main:
            report.write_report(join(self.spec.folder, "test"), scored, self.data, self.config, best)
        return {name.replace("eval/", "test/"): value for name, value in scored.figures.items()}

    def _score(self, detector: Detector, val: EvaluationSet) -> DetectionScores:
        predictions = predict(detector, self.config, val, self.group, self.learner.precision, self.hooks.stop_requested)
        scored = score(predictions, val, self.data.evaluated, self.group)
        if bad := scored.predictions.bad:
            named = "; ".join(f"{sample['location']} {sample['reason']}" for sample in bad[:LISTED_KEY_FRAMES])
            more = f"; and {len(bad) - LISTED_KEY_FRAMES} more" if len(bad) > LISTED_KEY_FRAMES else ""
            count = f"{len(bad)} of {len(val.key_frames)} key frames"
            self.emit("warning", text=f"data.val: {count} cannot be read and count as missed: {named}{more}")
        return scored
