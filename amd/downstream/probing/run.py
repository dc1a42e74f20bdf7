"""A probe from its config to its figures: features, the probes asked for, the encoder's card.

The place that chooses between this process and Ray. Knows nothing of how a feature or a figure comes about.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from amd.artifacts.weights import WEIGHTS, Card, Score, encoder_url, load_card, load_encoder, write_card
from amd.config import (
    ClipConfig,
    ConfigError,
    DataConfig,
    FewShotConfig,
    Interpolation,
    KnnConfig,
    LinearConfig,
    Precision,
    ProbeConfig,
    ProbeDataConfig,
    ProbeKind,
    RunProbeConfig,
    ScalingConfig,
)
from amd.data.dataset.manifest import Manifest
from amd.data.faults import Bad
from amd.data.loading.order import share
from amd.downstream.arrays import Features, Labels
from amd.downstream.embedding.cache import FeatureKey, Part, kept_parts, spans
from amd.downstream.embedding.features import Embedder, FeaturePooling, absolute, augmented, embed_spans, gather
from amd.downstream.probing.classifiers import knn, linear, top1, top_k
from amd.downstream.probing.few_shot import check_enough, few_shot
from amd.downstream.probing.labels import LabelledSets, check_several, open_labelled
from amd.downstream.probing.linear import AUGMENTS, batch_size, logits, shuffled, train_head
from amd.models.encoder import Encoder
from amd.storage import is_remote, join, local_path, read_bytes, resolve_root
from amd.training.process_group import Team

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


class ProbeReport(BaseModel):
    """What a probe found; the last line of `amd probe --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    encoder: str
    """Its folder."""
    scores: tuple[Score, ...]
    """As written to the encoder's card."""
    left_out: tuple[dict[str, Any], ...] = ()
    """Samples that could not be read."""
    seconds: float


def run_probe(config: ProbeConfig, say: Say = logger.info) -> ProbeReport:
    """Probe a published encoder and write the figures to its card. Raises ConfigError, and DataFault."""
    began = time.monotonic()
    root = resolve_root(config.storage)
    url = encoder_url(root, config.encoder)
    url = url if is_remote(url) else str(local_path(url))
    card = load_card(url)
    data = absolute(config.data).model_copy(update={"interpolation": card.interpolation})
    sets = open_labelled(data, config.classes)
    if "few_shot" in config.kinds:
        check_enough(sets.known_labels, config.few_shot.labels, f"data.train={data.train}", sets.known.classes)
    with _workers(config, url, card, say) as (embedder, compute, precision):

        def parts(data: DataConfig, manifest: Manifest) -> Iterator[Part]:
            work = partial(compute, data, manifest, spans(len(manifest)))
            if not config.cache:
                return iter(work())
            key = FeatureKey(
                encoder=card.sha256 or hashlib.sha256(read_bytes(join(url, WEIGHTS))).hexdigest(),
                data=data.train,
                digest=manifest.digest(),
                clip=card.clip,
                interpolation=data.interpolation,
                center_fraction=data.center_fraction,
                pooling=embedder.pooling,
                precision=precision,
            )
            return kept_parts(key.folder(root), key, work)

        subject = Subject(data, sets, embedder, parts, say)
        scores = tuple(_score(kind, subject, config) for kind in dict.fromkeys(config.kinds))
    add_scores(url, scores)
    seconds = round(time.monotonic() - began, 3)
    return ProbeReport(encoder=url, scores=scores, left_out=tuple({**bad} for bad in subject.left_out), seconds=seconds)


def add_scores(url: str, scores: Iterable[Score]) -> None:
    """Write figures to the card of the encoder in the folder `url`; older ones of the same protocol and data go."""
    new = tuple(scores)
    card = load_card(url)  # as it is now: a probe may take long
    replaced = {(score.protocol, score.data) for score in new}
    kept = tuple(score for score in card.scores if (score.protocol, score.data) not in replaced)
    write_card(url, card.model_copy(update={"scores": kept + new}))


class Subject:
    """A frozen encoder and what it is probed on; features are computed when first asked for."""

    def __init__(
        self,
        data: ProbeDataConfig,
        sets: LabelledSets,
        embedder: Embedder,
        parts: Callable[[DataConfig, Manifest], Iterable[Part]],
        say: Say,
    ) -> None:
        self.data, self.sets, self.embedder, self.say = data, sets, embedder, say
        self._parts = parts
        self.left_out: list[Bad] = []

    @cached_property
    def known(self) -> Features:
        features = self._features("data.train", self.data, self.sets.known, self.sets.known_labels)
        check_several(features.labels, self.data.train)
        return features

    @cached_property
    def asked(self) -> Features:
        data = self.data.model_copy(update={"train": self.data.test})
        return self._features("data.test", data, self.sets.asked, self.sets.asked_labels)

    def _features(self, field: str, data: DataConfig, manifest: Manifest, labels: Labels) -> Features:
        self.say(f"features of {field}={data.train}: {len(manifest)} samples")
        found = gather(self._parts(data, manifest), len(manifest), data.max_bad_fraction)
        self.left_out += found.bad
        if not np.isfinite(found.values).all():
            raise ConfigError(
                [f"encoder: its features of {field}={data.train} are not all finite; it has diverged, probe another"]
            )
        return Features(found.values, labels[found.records])


# The probes: figures by name


def knn_values(subject: Subject, config: KnnConfig) -> dict[str, float]:
    known, asked = subject.known, subject.asked

    def figure(centre: bool) -> float:
        found = knn(
            known,
            asked.values,
            neighbours=config.neighbours,
            temperature=config.temperature,
            centre=centre,
            device=subject.embedder.device,
        )
        return top1(found, asked.labels)

    return {"eval/knn_top1": figure(False), "eval/knn_centred_top1": figure(True)}


def linear_values(subject: Subject, config: LinearConfig, seed: int) -> dict[str, float]:
    asked, classes = subject.asked, subject.sets.classes
    if config.method == "logistic":
        found = linear(subject.known, asked.values, strength=config.strength)
        return {"eval/top1": top1(found, asked.labels)}
    samples = len(subject.sets.known) if config.augment != "none" else len(subject.known.labels)
    batch = batch_size(config, samples)
    if config.augment == "none":
        batches = shuffled(subject.known, batch, config.epochs, seed)
    else:
        subject.say(f"linear: {config.epochs} epochs of {samples} augmented samples")
        data = subject.data.model_copy(update=AUGMENTS[config.augment])
        batches = augmented(
            subject.embedder,
            data,
            subject.sets.known,
            batch=batch,
            epochs=config.epochs,
            seed=seed,
        )
    head = train_head(
        batches,
        config,
        width=subject.embedder.width,
        classes=classes,
        batch=batch,
        steps_per_epoch=samples // batch,
        seed=seed,
        device=subject.embedder.device,
    )
    found_logits = logits(head, asked.values)
    values = {"eval/top1": top1(found_logits.argmax(axis=1).astype(np.int64), asked.labels)}
    return values | ({"eval/top5": top_k(found_logits, asked.labels, 5)} if classes > 5 else {})


def few_shot_values(subject: Subject, config: FewShotConfig, seed: int) -> dict[str, float]:
    """Mean and standard deviation over the draws, for each number of labels a class."""
    check_enough(subject.known.labels, config.labels, f"data.train={subject.data.train}", subject.sets.known.classes)
    values = {}
    for labels in config.labels:
        score = few_shot(
            subject.known, subject.asked, labels=labels, draws=config.draws, seed=seed, strength=config.strength
        )
        values[f"eval/{labels}_shot_top1"] = score.mean
        values[f"eval/{labels}_shot_top1_std"] = score.std
    return values


PROBES: dict[ProbeKind, Callable[[Subject, ProbeConfig], dict[str, float]]] = {
    "knn": lambda subject, config: knn_values(subject, config.knn),
    "linear": lambda subject, config: linear_values(subject, config.linear, config.seed),
    "few_shot": lambda subject, config: few_shot_values(subject, config.few_shot, config.seed),
}


def probe_now(
    config: RunProbeConfig,
    encoder: Encoder,
    clip: ClipConfig,
    interpolation: Interpolation,
    team: Team | None = None,
    scaling: ScalingConfig | None = None,
) -> dict[str, float]:
    """Probe an encoder in hand, nothing kept: what a run's probe does on the way. It is frozen for good: give a copy.

    `team`: its ranks share the embedding, all call this and get the same figures. `scaling`: where and how clips are
    embedded; none: on config.device.
    """
    data = absolute(config.data).model_copy(update={"interpolation": interpolation})
    sets = open_labelled(data, config.classes)
    pooling: FeaturePooling = "mean" if config.pooling == "card" else config.pooling
    embedder = Embedder(encoder, clip, pooling, scaling or ScalingConfig(device=config.device))
    team = team or Team()

    def parts(data: DataConfig, manifest: Manifest) -> Iterator[Part]:
        if team.world == 1:
            return embed_spans(embedder, data, manifest, spans(len(manifest)))
        mine = share(len(manifest), team.rank, team.world)
        found = team.gather(list(embed_spans(embedder, data, manifest, [mine] if mine else [])))
        return itertools.chain.from_iterable(found)

    subject = Subject(data, sets, embedder, parts, logger.info)
    for _ in (subject.known, subject.asked):  # on all ranks, before one of them goes on alone
        pass
    return team.from_leader(
        lambda: knn_values(subject, config.knn) | linear_values(subject, config.linear, config.seed)
    )


def _score(kind: ProbeKind, subject: Subject, config: ProbeConfig) -> Score:
    values = PROBES[kind](subject, config)
    logger.info("%s: %s", kind, values)
    settings: dict[str, Any] = getattr(config, kind).model_dump(mode="json")
    learnt = {"data": subject.data.train, "digest": subject.sets.known.digest(), "samples": len(subject.sets.known)}
    return Score(
        protocol=kind,
        data=subject.data.test,
        digest=subject.sets.asked.digest(),
        samples=len(subject.asked.labels),
        views="1x1",
        values=values,
        settings={**settings, "seed": config.seed, "pooling": subject.embedder.pooling, "learnt_on": learnt},
    )


# Where features are computed


Compute = Callable[[DataConfig, Manifest, Iterable[range]], Iterable[Part]]


class Workers(NamedTuple):
    embedder: Embedder
    """In this process: what learns on augmented samples."""
    compute: Compute
    precision: Precision


@contextmanager
def _workers(config: ProbeConfig, url: str, card: Card, say: Say) -> Iterator[Workers]:
    """This process, or Ray actors where scaling.workers asks for several; augmented samples are embedded here."""
    pooling: FeaturePooling = card.pooling if config.pooling == "card" else config.pooling
    several = config.scaling.workers[1] > 1
    encoder, _ = load_encoder(url)
    here = config.scaling.model_copy(update={"device": "auto"}) if several else config.scaling
    embedder = Embedder(encoder, card.clip, pooling, here)
    if not several:
        yield Workers(embedder, partial(embed_spans, embedder), embedder.precision)
        return
    from amd.downstream.embedding import ray_features

    with ray_features.workers(config.scaling, url, pooling, say) as (compute, precision):
        yield Workers(embedder, compute, precision)
