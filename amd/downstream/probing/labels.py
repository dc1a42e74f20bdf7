"""Labels of a probe's training and test set, checked before any sample is read. Independent of encoders."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from amd.config import ConfigError, ProbeDataConfig
from amd.data.dataset.manifest import Manifest, ManifestError
from amd.data.dataset.open import open_manifest
from amd.downstream.arrays import Labels


class LabelledSets(NamedTuple):
    """Training and test set of a probe, with labels numbered alike in both."""

    train: Manifest
    test: Manifest
    train_labels: Labels  # (n,)
    test_labels: Labels  # (m,)
    classes: int


def open_labelled(data: ProbeDataConfig, classes: int | None = None) -> LabelledSets:
    """Open both manifests of a probe. `classes`: their number, by default one more than the highest training label.

    If both sets are folders of classes, classes are matched by name. Raises ConfigError for missing or invalid labels.
    """
    train = open_manifest(data)
    try:
        test = open_manifest(data, data.test)
    except ManifestError as error:
        raise ManifestError([line.replace("data.train", "data.test") for line in error.problems]) from None
    train_labels, test_labels = train.labels, test.labels
    _check_present("data.train", data.train, train, train_labels)
    _check_present("data.test", data.test, test, test_labels)
    if train.classes and test.classes:
        test_labels = _by_name(train.classes, test.classes, data)[test_labels]
    check_several(train_labels, data.train)
    count = classes or int(train_labels.max()) + 1
    if train_labels.max() >= count:
        raise ConfigError([_out_of_range("data.train", data.train, train, train_labels, count)])
    unknown = ~np.isin(test_labels, train_labels)
    if unknown.any():
        first = int(np.flatnonzero(unknown)[0])
        if test_labels.max() >= count:
            raise ConfigError([_out_of_range("data.test", data.test, test, test_labels, count)])
        raise ConfigError(
            [
                f"data.test={data.test}: {int(unknown.sum())} samples are of classes without samples in data.train="
                f"{data.train}, the first is {test[first].name} of class {test_labels[first]}; add samples of that "
                "class to data.train, or remove them from data.test"
            ]
        )
    return LabelledSets(train, test, train_labels, test_labels, count)


def _check_present(field: str, url: str, manifest: Manifest, labels: Labels) -> None:
    unlabelled = np.flatnonzero(labels < 0)
    if len(unlabelled):
        first = manifest[int(unlabelled[0])].name
        raise ConfigError(
            [
                f"{field}={url}: {len(unlabelled)} samples have no label, the first is {first}; "
                "a probe needs all labels: use one folder per class, or a list with lines `path label`, labels from 0"
            ]
        )


def check_several(labels: Labels, url: str) -> None:
    """Raise ConfigError if all samples are of one class."""
    if len(np.unique(labels)) < 2:
        raise ConfigError(
            [f"data.train={url}: all samples are of class {labels[0]}; a probe needs at least two classes"]
        )


def _out_of_range(field: str, url: str, manifest: Manifest, labels: Labels, classes: int) -> str:
    first = int(np.flatnonzero(labels >= classes)[0])
    return (
        f"{field}={url}: {manifest[first].name} has label {labels[first]}, but there are {classes} classes, numbered "
        f"from 0; correct the list, or set classes={int(labels.max()) + 1}"
    )


def _by_name(train: tuple[str, ...], test: tuple[str, ...], data: ProbeDataConfig) -> Labels:
    """Map each test class to the number of the training class of the same name."""
    number = {name: i for i, name in enumerate(train)}
    unmatched = [name for name in test if name not in number]
    if unmatched:
        shown = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
        raise ConfigError(
            [
                f"data.test={data.test}: class folders {shown} are not among those of data.train={data.train}; add "
                "them to data.train, or remove them from data.test"
            ]
        )
    return np.array([number[name] for name in test], np.int64)
