"""Action detection on one rank: the loop with a detector, frame-mAP every few epochs, and the test at the end."""

from __future__ import annotations

from typing import Any

from amd.config import DetectionConfig
from amd.data.loading.loader import ClipLoader, Records
from amd.downstream.supervised.detection import report
from amd.downstream.supervised.detection.augment import TrainingCut
from amd.downstream.supervised.detection.data import Scene, open_data, reader_of
from amd.downstream.supervised.detection.evaluation import Scored, look, score
from amd.downstream.supervised.detection.learner import DetectionLearner, new_detector
from amd.downstream.supervised.detection.model import Detector
from amd.exchange.start import load_starting_point
from amd.flops import encoder_flops
from amd.storage import join
from amd.training.process_group import Team
from amd.training.run_folder import RunSpec
from amd.training.trainer.loop import Edge, Outcome, Training

NAMED = 5  # unreadable key frames in a warning


def work(spec: RunSpec, team: Team, edge: Edge) -> Outcome:
    """Train from the newest checkpoint to the end, test the best one; or stop on the way."""
    return Detecting(spec, team, edge).run()


class Detecting(Training):
    learner: DetectionLearner

    def __init__(self, spec: RunSpec, team: Team, edge: Edge) -> None:
        self.config = config = spec.parsed(DetectionConfig)
        self.data = open_data(config)
        super().__init__(spec, config, team, edge)
        self.actions = self.data.label_map.classes
        start = self._start if config.weights else None
        self.learner = DetectionLearner(config, team, self.actions, start, self.data.train)

    def open_manifest(self) -> Records:
        return self.data.train

    def open_loader(self, **more: Any) -> ClipLoader:
        clip = self.config.clip
        return super().open_loader(cut=TrainingCut(self.config.data, clip), open_reader=reader_of(clip), **more)

    def _start(self, detector: Detector) -> None:
        config = self.config
        assert config.weights is not None, "only a run that begins with weights comes here"
        load_starting_point(detector.encoder, config.weights, config.storage, config.clip)

    def flops_per_clip(self) -> float:
        """Three times a forward pass, the embedding twice: no gradient flows to pixels."""
        clip = self.config.clip
        embedding, blocks = encoder_flops(self.config.encoder, clip.grid.tokens, clip.token_values)
        return 2 * embedding + 3 * blocks

    def evaluate(self, done: int) -> dict[str, float]:
        every = self.config.evaluation.every_epochs * self.loader.steps_per_epoch
        scene = self.data.scene
        if scene is None or (done % every and done != self.steps):
            return {}
        scored = self._score(self.learner.detector, scene)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scored.figures.items())
        self.tell("note", text=f"step {done}: {shown}")
        return scored.figures

    def conclude(self, done: int) -> dict[str, float]:
        """Test the best checkpoint; results and reports go to the run's folder."""
        scene, team = self.data.scene, self.team
        if scene is None:
            return {}
        found = self.store.load_best() if team.leads else None
        best = team.from_leader(lambda: found[0] if found else 0)
        detector = new_detector(self.config, self.actions)
        detector.load_state_dict((found[1] if found else self.store.load(best)).tensors["model"])
        self.tell("note", text=f"testing step {best} on {len(scene.looked_at)} key frames")
        scored = self._score(detector.to(team.device), scene)
        if team.leads:
            report.write_report(join(self.spec.folder, "test"), scored, self.data, self.config, best)
        return {name.replace("eval/", "test/"): value for name, value in scored.figures.items()}

    def _score(self, detector: Detector, scene: Scene) -> Scored:
        seen = look(detector, self.config, scene, self.team, self.learner.precision, self.edge.stop_requested)
        scored = score(seen, scene, self.data.evaluated, self.team)
        if bad := scored.seen.bad:
            named = "; ".join(f"{sample['location']} {sample['reason']}" for sample in bad[:NAMED])
            more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            count = f"{len(bad)} of {len(scene.looked_at)} key frames"
            self.tell("warning", text=f"data.val: {count} cannot be read, their actions are missed: {named}{more}")
        return scored
