"""Run probes from a config: compute features, run the requested probes, and add their scores to the encoder's card.

Features are computed in this process or in Ray actors.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from amd.artifacts.weights import WEIGHTS, Card, Score, encoder_url, load_card, load_encoder, write_card
from amd.config import (
    AttentiveConfig,
    ClipConfig,
    DataConfig,
    FewShotConfig,
    Interpolation,
    KnnConfig,
    LinearConfig,
    Precision,
    ProbeConfig,
    ProbeKind,
    RunProbeConfig,
    ScalingConfig,
)
from amd.data.dataset.manifest import Manifest
from amd.data.loading.order import share
from amd.downstream.arrays import Array, Labels, top_k
from amd.downstream.embedding.cache import FeatureKey, Part, cached_parts, spans
from amd.downstream.embedding.features import (
    Embedder,
    FeaturePooling,
    augmented,
    embed_spans,
    with_absolute_paths,
)
from amd.downstream.probing.attentive import (
    attentive_batch_size,
    check_heads,
    classify,
    collect_tokens,
    train_attentive,
)
from amd.downstream.probing.classifiers import knn, linear, top1
from amd.downstream.probing.few_shot import check_enough, few_shot
from amd.downstream.probing.labels import open_labelled
from amd.downstream.probing.linear import AUGMENTS, batch_size, logits, shuffled, train_head
from amd.downstream.probing.probed_encoder import Log, ProbedEncoder
from amd.models.encoder import Encoder
from amd.storage import is_remote, join, local_path, read_bytes, resolve_root
from amd.training.process_group import ProcessGroup

logger = logging.getLogger(__name__)


class ProbeReport(BaseModel):
    """Result of a probe, printed as the last line of `amd probe --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    encoder: str
    """Folder that contains the encoder."""
    scores: tuple[Score, ...]
    """Scores written to the encoder's card."""
    left_out: tuple[dict[str, Any], ...] = ()
    """Samples that could not be read, with the reason for each."""
    seconds: float


def run_probe(config: ProbeConfig, log: Log = logger.info) -> ProbeReport:
    """Probe a published encoder and write the scores to its card.

    Raises ConfigError for invalid input, or DataFault if too many samples cannot be read.
    """
    started = time.monotonic()
    root = resolve_root(config.storage)
    url = encoder_url(root, config.encoder)
    url = url if is_remote(url) else str(local_path(url))
    card = load_card(url)
    data = with_absolute_paths(config.data).model_copy(update={"interpolation": card.interpolation})
    sets = open_labelled(data, config.classes)
    if "few_shot" in config.kinds:
        check_enough(sets.train_labels, config.few_shot.labels, f"data.train={data.train}", sets.train.classes)
    with _workers(config, url, card, log) as (embedder, compute, precision):

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
            return cached_parts(key.folder(root), key, work)

        probed = ProbedEncoder(data, sets, embedder, parts, log)
        scores = tuple(_score(kind, probed, config) for kind in dict.fromkeys(config.kinds))
    add_scores(url, scores)
    seconds = round(time.monotonic() - started, 3)
    return ProbeReport(encoder=url, scores=scores, left_out=tuple({**bad} for bad in probed.left_out), seconds=seconds)


def add_scores(url: str, scores: Iterable[Score]) -> None:
    """Add scores to the card of the encoder at `url`, replacing existing scores with the same protocol and data."""
    new = tuple(scores)
    card = load_card(url)  # read again: the card may have changed during a long probe
    replaced = {(score.protocol, score.data) for score in new}
    kept = tuple(score for score in card.scores if (score.protocol, score.data) not in replaced)
    write_card(url, card.model_copy(update={"scores": kept + new}))


# Probes; each returns scores by metric name


def knn_values(probed: ProbedEncoder, config: KnnConfig) -> dict[str, float]:
    train, test = probed.train, probed.test

    def score(centre: bool) -> float:
        predicted = knn(
            train,
            test.values,
            neighbours=config.neighbours,
            temperature=config.temperature,
            centre=centre,
            device=probed.embedder.device,
        )
        return top1(predicted, test.labels)

    return {"eval/knn_top1": score(False), "eval/knn_centred_top1": score(True)}


def linear_values(probed: ProbedEncoder, config: LinearConfig, seed: int) -> dict[str, float]:
    test = probed.test
    if config.method == "logistic":
        predicted = linear(probed.train, test.values, strength=config.strength)
        return {"eval/top1": top1(predicted, test.labels)}
    samples = len(probed.sets.train) if config.augment != "none" else len(probed.train.labels)
    batch = batch_size(config, samples)
    if config.augment == "none":
        batches = shuffled(probed.train, batch, config.epochs, seed)
    else:
        probed.log(f"linear: {config.epochs} epochs of {samples} augmented samples")
        data = probed.data.model_copy(update=AUGMENTS[config.augment])
        batches = augmented(
            probed.embedder,
            data,
            probed.sets.train,
            batch=batch,
            epochs=config.epochs,
            seed=seed,
        )
    head = train_head(
        batches,
        config,
        width=probed.embedder.width,
        classes=probed.sets.classes,
        batch=batch,
        steps_per_epoch=samples // batch,
        seed=seed,
        device=probed.embedder.device,
    )
    return top_values(logits(head, test.values), test.labels)


def top_values(scores: Array, labels: Labels) -> dict[str, float]:
    """Return the top-1 accuracy of logits (m, C), and the top-5 accuracy if there are more than five classes."""
    values = {"eval/top1": top1(scores.argmax(axis=1).astype(np.int64), labels)}
    if scores.shape[1] > 5:
        values["eval/top5"] = 100 * top_k(scores, labels, 5) / len(labels)
    return values


def few_shot_values(probed: ProbedEncoder, config: FewShotConfig, seed: int) -> dict[str, float]:
    """Return the mean accuracy and its standard deviation across draws, for each number of labels per class."""
    check_enough(probed.train.labels, config.labels, f"data.train={probed.data.train}", probed.sets.train.classes)
    values = {}
    for labels in config.labels:
        score = few_shot(
            probed.train, probed.test, labels=labels, draws=config.draws, seed=seed, strength=config.strength
        )
        values[f"eval/{labels}_shot_top1"] = score.mean
        values[f"eval/{labels}_shot_top1_std"] = score.std
    return values


def attentive_values(probed: ProbedEncoder, config: AttentiveConfig, seed: int) -> dict[str, float]:
    embedder = probed.embedder
    heads = check_heads(config, embedder.encoder.config)
    samples = len(probed.sets.train)
    if config.augment == "none":
        tokens = collect_tokens(probed.tokens("train"), samples, config)
        samples = len(tokens.labels)
        batch = attentive_batch_size(config, samples)
        batches = shuffled(tokens, batch, config.epochs, seed)
    else:
        probed.log(f"attentive: {config.epochs} epochs of {samples} augmented samples")
        batch = attentive_batch_size(config, samples)
        data = probed.data.model_copy(update=AUGMENTS[config.augment])
        batches = augmented(
            embedder,
            data,
            probed.sets.train,
            batch=batch,
            epochs=config.epochs,
            seed=seed,
            compute=embedder.tokens,
        )
    head = train_attentive(
        batches,
        config,
        width=embedder.width,
        heads=heads,
        classes=probed.sets.classes,
        steps_per_epoch=samples // batch,
        seed=seed,
        device=embedder.device,
    )
    return top_values(*classify(head, probed.tokens("test")))


PROBES: dict[ProbeKind, Callable[[ProbedEncoder, ProbeConfig], dict[str, float]]] = {
    "knn": lambda probed, config: knn_values(probed, config.knn),
    "linear": lambda probed, config: linear_values(probed, config.linear, config.seed),
    "few_shot": lambda probed, config: few_shot_values(probed, config.few_shot, config.seed),
    "attentive": lambda probed, config: attentive_values(probed, config.attentive, config.seed),
}


def probe_now(
    config: RunProbeConfig,
    encoder: Encoder,
    clip: ClipConfig,
    interpolation: Interpolation,
    group: ProcessGroup | None = None,
    scaling: ScalingConfig | None = None,
) -> dict[str, float]:
    """Probe an encoder in memory during a run, without caching or writing. Freezes the encoder, so pass a copy.

    `group`: ranks that share the work; all of them must call this function, and all get the same scores. `scaling`:
    device and precision for embedding. Default: config.device.
    """
    data = with_absolute_paths(config.data).model_copy(update={"interpolation": interpolation})
    sets = open_labelled(data, config.classes)
    pooling: FeaturePooling = "mean" if config.pooling == "card" else config.pooling
    embedder = Embedder(encoder, clip, pooling, scaling or ScalingConfig(device=config.device))
    group = group or ProcessGroup()

    def parts(data: DataConfig, manifest: Manifest) -> Iterator[Part]:
        if group.world == 1:
            return embed_spans(embedder, data, manifest, spans(len(manifest)))
        mine = share(len(manifest), group.rank, group.world)
        found = group.gather(list(embed_spans(embedder, data, manifest, [mine] if mine else [])))
        return itertools.chain.from_iterable(found)

    probed = ProbedEncoder(data, sets, embedder, parts, logger.info)
    for _ in (probed.train, probed.test):  # compute on all ranks before the main rank continues alone
        pass
    return group.broadcast_from_main(
        lambda: knn_values(probed, config.knn) | linear_values(probed, config.linear, config.seed)
    )


def _score(kind: ProbeKind, probed: ProbedEncoder, config: ProbeConfig) -> Score:
    values = PROBES[kind](probed, config)
    logger.info("%s: %s", kind, values)
    settings: dict[str, Any] = getattr(config, kind).model_dump(mode="json")
    learnt_on = {"data": probed.data.train, "digest": probed.sets.train.digest(), "samples": len(probed.sets.train)}
    return Score(
        protocol=kind,
        data=probed.data.test,
        digest=probed.sets.test.digest(),
        samples=probed.scored,
        views="1x1",
        values=values,
        settings={**settings, "seed": config.seed, "pooling": probed.embedder.pooling, "learnt_on": learnt_on},
    )


# Feature computation


Compute = Callable[[DataConfig, Manifest, Iterable[range]], Iterable[Part]]


class Workers(NamedTuple):
    embedder: Embedder
    """In-process embedder, used to train heads on augmented samples."""
    compute: Compute
    precision: Precision


@contextmanager
def _workers(config: ProbeConfig, url: str, card: Card, log: Log) -> Iterator[Workers]:
    """Embed in this process, or in Ray actors if scaling.workers exceeds one.

    Augmented samples are always embedded in this process.
    """
    pooling: FeaturePooling = card.pooling if config.pooling == "card" else config.pooling
    distributed = config.scaling.workers[1] > 1
    encoder, _ = load_encoder(url)
    local = config.scaling.model_copy(update={"device": "auto"}) if distributed else config.scaling
    embedder = Embedder(encoder, card.clip, pooling, local)
    if not distributed:
        yield Workers(embedder, partial(embed_spans, embedder), embedder.precision)
        return
    from amd.downstream.embedding import ray_features

    with ray_features.workers(config.scaling, url, pooling, log) as (compute, precision):
        yield Workers(embedder, compute, precision)
