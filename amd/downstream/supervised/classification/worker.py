"""Fine-tuning on one rank: the training loop, periodic validation and the final test."""

from __future__ import annotations

from amd.config import FinetuneConfig, ViewsConfig
from amd.data.dataset.manifest import Manifest
from amd.downstream.supervised.classification import report
from amd.downstream.supervised.classification.data import LabelledSplit, open_splits
from amd.downstream.supervised.classification.evaluation import ClassificationScores, ViewPredictions, predict, score
from amd.downstream.supervised.classification.learner import Finetuner, load_eval_weights, new_classifier
from amd.exchange.initialization import load_starting_point
from amd.flops import encoder_flops
from amd.models.classifier import Classifier
from amd.storage import join, remove
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunSpec
from amd.training.trainer.loop import LoopResult, RunHooks, Training

LISTED_SAMPLES = 5  # unreadable samples listed in a warning


def work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Fine-tune from the newest checkpoint and test the best one, unless stopped earlier."""
    return Finetuning(spec, group, hooks).run()


class Finetuning(Training):
    learner: Finetuner

    def __init__(self, spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> None:
        self.config = config = spec.parsed(FinetuneConfig)
        self.splits = open_splits(config)
        super().__init__(spec, config, group, hooks)
        train, classes = self.splits["data.train"], config.head.classes or 0
        self.learner = Finetuner(
            config, group, self._start if config.weights else None, lambda batch: train.targets(batch, classes)
        )

    def open_manifest(self) -> Manifest:
        return self.splits["data.train"].manifest

    def _start(self, classifier: Classifier) -> None:
        config = self.config
        assert config.weights is not None, "only called for runs with weights"
        load_starting_point(classifier.encoder, config.weights, config.storage, config.clip, final_norm=False)

    def flops_per_clip(self) -> float:
        """Return three times the FLOPs of a forward pass, twice for the patch embedding, as pixels need no gradient."""
        clip = self.config.clip
        embedding, blocks = encoder_flops(self.config.encoder, clip.grid.tokens, clip.token_values)
        return 2 * embedding + 3 * blocks

    def evaluate(self, done: int) -> dict[str, float]:
        every = self.config.evaluation.every_epochs * self.loader.steps_per_epoch
        split = self.splits.get("data.val")
        if split is None or (done % every and done != self.steps):
            return {}
        views = self.config.evaluation.views.model_copy(update={"segments": 1, "crops": 1})
        scored = self._score(self._predict(self.learner.tested, split, views), split)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scored.figures.items())
        self.emit("note", text=f"step {done}: {shown}")
        return scored.figures

    def finalize(self, done: int) -> dict[str, float]:
        """Test the best checkpoint with all views and write reports to the run's folder."""
        split = self.splits.get("data.test") or self.splits.get("data.val")
        if split is None:
            return {}
        found = self.store.load_best() if self.group.is_main else None
        best = self.group.broadcast_from_main(lambda: found[0] if found else 0)
        classifier = new_classifier(self.config)
        load_eval_weights(classifier, (found[1] if found else self.store.load(best)).tensors)
        views, folder = self.config.evaluation.views, join(self.spec.folder, "test")
        self.emit("note", text=f"testing step {best}: {views} views of {len(split.manifest)} samples")
        self.group.broadcast_from_main(lambda: remove(folder))  # left by an interrupted test, possibly on more workers
        predictions = self._predict(classifier.to(self.group.device), split, views)
        report.write_views(folder, predictions, split, views, self.group.rank)
        scored = self._score(predictions, split)
        if self.group.is_main:
            report.write_report(folder, scored, split, self.config, best)
        return {name.replace("eval/", "test/"): value for name, value in scored.figures.items()}

    def _predict(self, classifier: Classifier, split: LabelledSplit, views: ViewsConfig) -> ViewPredictions:
        return predict(
            classifier, self.config, split, views, self.group, self.learner.precision, self.hooks.stop_requested
        )

    def _score(self, predictions: ViewPredictions, split: LabelledSplit) -> ClassificationScores:
        scored = score(predictions, split, self.config, self.group)
        if scored.bad:
            self.emit("warning", text=unreadable_warning(scored, split))
        return scored


def unreadable_warning(scored: ClassificationScores, split: LabelledSplit) -> str:
    names = "; ".join(f"{sample['location']} {sample['reason']}" for sample in scored.bad[:LISTED_SAMPLES])
    more = f"; and {len(scored.bad) - LISTED_SAMPLES} more" if len(scored.bad) > LISTED_SAMPLES else ""
    return (
        f"{split.field}: {len(scored.bad)} of {scored.total} samples cannot be read and count as wrong: {names}{more}"
    )
