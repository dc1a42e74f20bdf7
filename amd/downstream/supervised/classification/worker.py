"""Fine-tuning on one rank: the loop with a classifier, validation every few epochs, and the test at the end."""

from __future__ import annotations

from amd.config import FinetuneConfig, ViewsConfig
from amd.data.dataset.manifest import Manifest
from amd.downstream.supervised.classification import report
from amd.downstream.supervised.classification.data import Labelled, open_splits
from amd.downstream.supervised.classification.evaluation import Scored, Seen, look, score
from amd.downstream.supervised.classification.learner import Finetuner, load_tested, new_classifier
from amd.exchange.start import load_starting_point
from amd.flops import encoder_flops
from amd.models.classifier import Classifier
from amd.storage import join, remove
from amd.training.process_group import Team
from amd.training.run_folder import RunSpec
from amd.training.trainer.loop import Edge, Outcome, Training

NAMED = 5  # unreadable samples in a warning


def work(spec: RunSpec, team: Team, edge: Edge) -> Outcome:
    """Fine-tune from the newest checkpoint to the end, test the best one; or stop on the way."""
    return Finetuning(spec, team, edge).run()


class Finetuning(Training):
    learner: Finetuner

    def __init__(self, spec: RunSpec, team: Team, edge: Edge) -> None:
        self.config = config = spec.parsed(FinetuneConfig)
        self.splits = open_splits(config)
        super().__init__(spec, config, team, edge)
        train, classes = self.splits["data.train"], config.head.classes or 0
        self.learner = Finetuner(
            config, team, self._start if config.weights else None, lambda batch: train.targets(batch, classes)
        )

    def open_manifest(self) -> Manifest:
        return self.splits["data.train"].manifest

    def _start(self, classifier: Classifier) -> None:
        config = self.config
        assert config.weights is not None, "only a run that begins with weights comes here"
        load_starting_point(classifier.encoder, config.weights, config.storage, config.clip, final_norm=False)

    def flops_per_clip(self) -> float:
        """Three times a forward pass, the embedding twice: no gradient flows to pixels."""
        clip = self.config.clip
        embedding, blocks = encoder_flops(self.config.encoder, clip.grid.tokens, clip.token_values)
        return 2 * embedding + 3 * blocks

    def evaluate(self, done: int) -> dict[str, float]:
        every = self.config.evaluation.every_epochs * self.loader.steps_per_epoch
        split = self.splits.get("data.val")
        if split is None or (done % every and done != self.steps):
            return {}
        views = self.config.evaluation.views.model_copy(update={"segments": 1, "crops": 1})
        scored = self._score(self._look(self.learner.tested, split, views), split)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scored.figures.items())
        self.tell("note", text=f"step {done}: {shown}")
        return scored.figures

    def conclude(self, done: int) -> dict[str, float]:
        """Test the best checkpoint with all views; scores and reports go to the run's folder."""
        split = self.splits.get("data.test") or self.splits.get("data.val")
        if split is None:
            return {}
        found = self.store.load_best() if self.team.leads else None
        best = self.team.from_leader(lambda: found[0] if found else 0)
        classifier = new_classifier(self.config)
        load_tested(classifier, (found[1] if found else self.store.load(best)).tensors)
        views, folder = self.config.evaluation.views, join(self.spec.folder, "test")
        self.tell("note", text=f"testing step {best}: {views} views of {len(split.manifest)} samples")
        self.team.from_leader(lambda: remove(folder))  # of a test that was broken off, maybe on more workers
        seen = self._look(classifier.to(self.team.device), split, views)
        report.write_views(folder, seen, split, views, self.team.rank)
        scored = self._score(seen, split)
        if self.team.leads:
            report.write_report(folder, scored, split, self.config, best)
        return {name.replace("eval/", "test/"): value for name, value in scored.figures.items()}

    def _look(self, classifier: Classifier, split: Labelled, views: ViewsConfig) -> Seen:
        return look(classifier, self.config, split, views, self.team, self.learner.precision, self.edge.stop_requested)

    def _score(self, seen: Seen, split: Labelled) -> Scored:
        scored = score(seen, split, self.config, self.team)
        if scored.bad:
            self.tell("warning", text=unreadable(scored, split))
        return scored


def unreadable(scored: Scored, split: Labelled) -> str:
    names = "; ".join(f"{sample['location']} {sample['reason']}" for sample in scored.bad[:NAMED])
    more = f"; and {len(scored.bad) - NAMED} more" if len(scored.bad) > NAMED else ""
    return (
        f"{split.field}: {len(scored.bad)} of {scored.total} samples cannot be read and count as wrong: {names}{more}"
    )
