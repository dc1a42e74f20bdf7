"""Labelled data for a fine-tuning run: open it, match classes and check everything before training.

Errors are ConfigErrors that state the field, the rule and how to fix it. Builds no models.
"""

from __future__ import annotations

from contextlib import closing
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amd.config import ConfigError, FinetuneConfig, listed
from amd.data.dataset.label_sets import LabelSets, open_label_sets
from amd.data.dataset.manifest import Manifest, ManifestError, capped
from amd.data.dataset.open import open_manifest
from amd.data.decoding.reader import BadSample, SampleReader
from amd.data.loading.loader import Batch
from amd.downstream.arrays import Labels

PROBED_SAMPLES = 8  # samples opened to check their length


class LabelledSplit(NamedTuple):
    """One of the three labelled data sets of a run."""

    field: str
    url: str
    records: Manifest
    labels: Labels  # (n,) numbered as in data.train; the lowest of several labels
    names: tuple[str, ...] | None  # class names, in the order of data.train
    sets: LabelSets | None  # all labels of every sample, if multi-label

    def digest(self) -> str:
        own = self.records.digest()
        # the manifest holds only one label per sample
        return own if self.sets is None else f"{own}-{self.sets.digest()}"

    def targets(self, batch: Batch, classes: int) -> Tensor:
        """Return class indices (B,), or multi-hot vectors (B, C) if multi-label."""
        return torch.from_numpy(self.truth(batch.records.numpy(), classes))

    def truth(self, records: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
        if self.sets is None:
            return self.labels[records]
        ones = np.zeros((len(records), classes), np.int64)
        for row, record in enumerate(records.tolist()):
            ones[row, self.sets[record]] = 1
        return ones


def open_split(config: FinetuneConfig, field: str) -> LabelledSplit | None:
    """Open data.train, data.val or data.test; return None if it is not set."""
    url: str | None = getattr(config.data, field.removeprefix("data."))
    if url is None:
        return None
    try:
        if config.head.multi_label:
            manifest, sets = open_label_sets(config.data, url)
            return LabelledSplit(field, url, manifest, manifest.labels, None, sets)
        manifest = open_manifest(config.data, url)
    except ManifestError as error:
        raise ManifestError([line.replace("data.train", field) for line in error.problems]) from None
    return LabelledSplit(field, url, manifest, manifest.labels, manifest.classes, None)


def open_splits(config: FinetuneConfig) -> dict[str, LabelledSplit]:
    """Open the run's data sets, keyed by field; class folders are matched by name to those in data.train."""
    found = {field: open_split(config, field) for field in ("data.train", "data.val", "data.test")}
    splits = {field: split for field, split in found.items() if split is not None}
    train = splits["data.train"]
    for field, split in splits.items():
        labels = split.labels
        if split is not train and train.names and split.names:
            labels = _by_name(train.names, split)[labels]
        splits[field] = split._replace(labels=labels, names=train.names)
    return splits


def _by_name(known: tuple[str, ...], other: LabelledSplit) -> Labels:
    """Map each class folder of `other` to its class index in data.train."""
    assert other.names is not None
    number = {name: i for i, name in enumerate(known)}
    unmatched = [name for name in other.names if name not in number]
    if unmatched:
        raise ConfigError(
            [
                f"{other.field}={other.url}: class folders {listed(unmatched)} do not exist in data.train; "
                "add them there, or remove them here"
            ]
        )
    return np.array([number[name] for name in other.names], np.int64)


def count_classes(config: FinetuneConfig, train: LabelledSplit) -> int:
    if config.head.classes is not None:
        return config.head.classes
    values = train.sets.values if train.sets is not None else train.labels
    return int(values.max(initial=0)) + 1


def check_splits(config: FinetuneConfig, splits: dict[str, LabelledSplit]) -> None:
    """Check labels and clip lengths of all splits.

    Raises ConfigError listing the problems of the first check that fails.
    """
    train = splits["data.train"]
    problems: list[str] = []
    for split in splits.values():
        if not len(split.records):
            problems.append(f"{split.field}={split.url}: has no samples; check it with `amd validate`")
        elif split.sets is None and (split.labels < 0).any():
            unlabelled = np.flatnonzero(split.labels < 0)
            first = split.records[int(unlabelled[0])].name
            problems.append(
                f"{split.field}={split.url}: {len(unlabelled)} samples have no label (first: {first}); "
                "use one folder per class, or a list of `path label` lines, with labels starting at 0"
            )
    if problems:
        raise ConfigError(problems)
    classes = count_classes(config, train)
    problems += _too_few_classes(config, train, classes)
    for split in splits.values():
        problems += _out_of_range(split, classes)
    if problems:
        raise ConfigError(problems)
    for split in splits.values():
        problems += _too_short(config, split)
    if problems:
        raise ConfigError(problems)


def _too_few_classes(config: FinetuneConfig, train: LabelledSplit, classes: int) -> list[str]:
    values = train.sets.values if train.sets is not None else train.labels
    present = np.unique(values)
    if len(present) < 2:
        problem = f"all labels are {present[0]}" if len(present) else "no sample has a label"
        return [f"data.train={train.url}: {problem}; a classifier needs at least two classes"]
    missing = sorted(set(range(classes)) - set(present.tolist()))
    if missing and train.sets is None:
        remedy = (
            f"set head.classes={int(present.max()) + 1} or omit it"
            if missing[0] > present.max()
            else "number the classes from 0 without gaps, or add samples"
        )
        return [
            f"data.train={train.url}: {len(missing)} of {classes} classes have no samples (class "
            f"{listed(missing)}); {remedy}"
        ]
    return []


def _out_of_range(split: LabelledSplit, classes: int) -> list[str]:
    if split.sets is not None:
        owners = np.repeat(np.arange(len(split.sets)), np.diff(split.sets.offsets))
        records, labels = owners[split.sets.values >= classes], split.sets.values[split.sets.values >= classes]
    else:
        records = np.flatnonzero(split.labels >= classes)
        labels = split.labels[records]
    if not len(records):
        return []
    first = split.records[int(records[0])].name
    return [
        f"{split.field}={split.url}: {len(records)} labels are out of range (first: {labels[0]} of {first}); "
        f"there are {classes} classes, numbered from 0 (from head.classes, else from data.train)"
    ]


def _too_short(config: FinetuneConfig, split: LabelledSplit) -> list[str]:
    """Report a data set whose samples are all shorter than a clip, so that every clip would repeat frames."""
    frames, manifest = config.clip.frames, split.records
    if frames == 1:
        return []
    numbers = np.unique(np.linspace(0, len(manifest) - 1, PROBED_SAMPLES).astype(int)).tolist()
    lengths: list[int] = []

    def record_length(total: int) -> Labels:
        lengths.append(total)
        return np.zeros(1, np.int64)

    with closing(SampleReader(config.data)) as reader:
        for number in numbers:
            try:
                reader.read_clip(manifest[number], record_length)
            except BadSample:
                continue
    if not lengths or max(lengths) >= frames:
        return []
    return capped(
        [
            f"{split.field}={split.url}: the {len(lengths)} samples checked have at most {max(lengths)} frames, fewer "
            f"than clip.frames={frames}: clips would repeat frames; lower clip.frames, or use longer videos"
        ]
    )
