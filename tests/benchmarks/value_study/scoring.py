"""Score an encoder of the value study: probes on frozen features, and fine-tuning with few labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amd.artifacts.weights import encode, whole_clips
from amd.config import AttentiveConfig, FinetuneConfig, TrainConfig, validate
from amd.data.loading.loader import Batch
from amd.downstream.arrays import Features
from amd.downstream.embedding.features import LabelledClips
from amd.downstream.probing.attentive import attentive_batch_size, classify, collect_tokens, train_attentive
from amd.downstream.probing.classifiers import knn, linear, top1
from amd.downstream.probing.few_shot import draw_samples
from amd.downstream.probing.linear import shuffled
from amd.downstream.supervised.classification.learner import Finetuner
from amd.models.classifier import Classifier
from amd.models.encoder import Encoder
from amd.training.process_group import ProcessGroup
from amd.training.trainer.learner import Learner
from amd.training.trainer.optimizer import cosine_lr

CLASSES = 10
TUNED_LABELS = 50  # labelled images per class for fine-tuning
TUNING: dict[str, Any] = {
    "head": {"classes": CLASSES},
    "data": {"train": "unused", "val": "unused"},
    "optim": {"batch_size": 50, "base_lr": 2e-2, "min_lr": 1e-5, "layer_decay": 0.75, "clip_norm": 1.0},
    "schedule": {"steps": 300, "warmup_steps": 30},
    "scaling": {"device": "cpu", "threads_per_worker": 1},
}


class ScoredData(NamedTuple):
    labelled: LabelledClips  # the first images of the pre-training data, for probes
    held_out: LabelledClips


class StudiedEncoder:
    def __init__(self, encoder: Encoder, config: TrainConfig, data: ScoredData, seed: int) -> None:
        self.encoder, self.config, self.data, self.seed = encoder, config, data, seed

    @cached_property
    def features(self) -> tuple[Features, Features]:
        """Features of the labelled and of the held-out images."""
        labelled, held_out = (self._features(part) for part in self.data)
        return labelled, held_out

    def _features(self, part: LabelledClips) -> Features:
        clips = [encode(self.encoder, self.config.clip, some) for some in part.clips.split(500)]
        return Features(torch.cat(clips).numpy(), part.labels)


def take_steps(learner: Learner, config: TrainConfig | FinetuneConfig, batches: Iterator[Batch]) -> None:
    """Take the configured number of steps on batches in memory."""
    steps, warmup = config.schedule.steps or 0, config.schedule.warmup_steps or 0
    for step in range(steps):
        lr = cosine_lr(step, peak=config.optim.lr, final=config.optim.final_lr, steps=steps, warmup=warmup)
        learner.learn(step, [next(batches)], lr)
        if step % 50 == 0:
            learner.recent_losses.clear()


def _knn(scored: StudiedEncoder) -> float:
    train, test = scored.features
    return top1(knn(train, test.values), test.labels)


def _linear(scored: StudiedEncoder) -> float:
    train, test = scored.features
    return top1(linear(train, test.values), test.labels)


def _attentive(scored: StudiedEncoder) -> float:
    encoder, data, probe = scored.encoder, scored.data, AttentiveConfig()

    def tokens(labelled: LabelledClips) -> Iterator[tuple[Tensor, Tensor]]:
        for clips, labels in zip(labelled.clips.split(500), torch.from_numpy(labelled.labels).split(500), strict=True):
            final = encoder(*whole_clips(encoder, scored.config.clip, clips)).final
            assert final is not None
            yield final, labels

    with torch.inference_mode(False), torch.no_grad():
        train = collect_tokens(tokens(data.labelled), len(data.labelled.labels), probe)
    batch = attentive_batch_size(probe, len(train.labels))
    with torch.inference_mode(False):
        head = train_attentive(
            shuffled(train, batch, probe.epochs, scored.seed),
            probe,
            width=encoder.config.width,
            heads=encoder.config.heads,
            classes=CLASSES,
            steps_per_epoch=len(train.labels) // batch,
            seed=scored.seed,
        )
    scores, labels = classify(head, tokens(data.held_out))
    return top1(scores.argmax(axis=1), labels)


def _finetuned(scored: StudiedEncoder) -> float:
    """Fine-tune a copy of the encoder on TUNED_LABELS images per class; return its accuracy."""
    with torch.inference_mode(False):
        classifier = _tune(scored)
    held = scored.data.held_out
    logits = [classifier(*whole_clips(classifier.encoder, scored.config.clip, some)) for some in held.clips.split(500)]
    return top1(torch.cat(logits).argmax(dim=1).numpy(), held.labels)


def _tune(scored: StudiedEncoder) -> Classifier:
    values = {**TUNING, "clip": scored.config.clip, "encoder": scored.encoder.config, "seed": scored.seed}
    config = validate(FinetuneConfig, values)
    weights = scored.encoder.state_dict()

    def start(model: Classifier) -> None:
        model.encoder.load_state_dict(weights)
        model.encoder.norm.reset_parameters()  # it follows the pooling here, as in MAE

    learner = Finetuner(config, ProcessGroup(), start, lambda batch: batch.labels)
    rows = draw_samples(scored.data.labelled.labels, TUNED_LABELS, np.random.default_rng([scored.seed, TUNED_LABELS]))
    clips = scored.data.labelled.clips[torch.from_numpy(rows)]
    labels = torch.from_numpy(scored.data.labelled.labels[rows])

    def batches() -> Iterator[Batch]:
        order = torch.Generator().manual_seed(scored.seed)
        while True:
            for taken in torch.randperm(len(rows), generator=order).split(config.optim.batch_size):
                yield Batch(clips[taken], labels[taken], taken, [])

    take_steps(learner, config, batches())
    return learner.network.eval()


PROBES: dict[str, Callable[[StudiedEncoder], float]] = {
    "knn": _knn,
    "linear": _linear,
    "attentive": _attentive,
    "finetuned": _finetuned,
}


@torch.inference_mode()
def score(
    encoder: Encoder, config: TrainConfig, data: ScoredData, probes: Iterable[str], seed: int
) -> dict[str, float]:
    """Return the top-1 accuracy of each probe, in percent."""
    scored = StudiedEncoder(encoder, config, data, seed)
    return {probe: PROBES[probe](scored) for probe in probes}
