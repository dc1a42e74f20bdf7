"""Labels of a probe's training and test sets, checked before any sample is read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from amd.config import ConfigError, ProbeDataConfig, listed
from amd.data.dataset.manifest import Manifest, ManifestError
from amd.data.dataset.open import open_manifest
from amd.downstream.arrays import Labels


class LabelledSets(NamedTuple):
    """A probe's training and test sets, with labels numbered consistently across both."""

    train: Manifest
    test: Manifest
    train_labels: Labels  # (n,)
    test_labels: Labels  # (m,)
    classes: int


def open_labelled(data: ProbeDataConfig, classes: int | None = None) -> LabelledSets:
    """Open both manifests of a probe. `classes`: number of classes. Default: the highest training label + 1.

    If both sets are class folders, classes are matched by name. Raises ConfigError for missing or invalid labels.
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
                f"data.test={data.test}: {int(unknown.sum())} samples belong to classes without samples in "
                f"data.train={data.train} (first: {test[first].name} of class {test_labels[first]}); add samples "
                "of that class to data.train, or remove them from data.test"
            ]
        )
    return LabelledSets(train, test, train_labels, test_labels, count)


def _check_present(field: str, url: str, manifest: Manifest, labels: Labels) -> None:
    unlabelled = np.flatnonzero(labels < 0)
    if len(unlabelled):
        first = manifest[int(unlabelled[0])].name
        raise ConfigError(
            [
                f"{field}={url}: {len(unlabelled)} samples have no label (first: {first}); every sample of a "
                "probe must be labelled: use one folder per class, or a list of `path label` lines, with labels "
                "starting at 0"
            ]
        )


def check_several(labels: Labels, url: str) -> None:
    """Check that there are at least two classes. Raises ConfigError."""
    if len(np.unique(labels)) < 2:
        raise ConfigError(
            [f"data.train={url}: all samples belong to class {labels[0]}; a probe needs at least two classes"]
        )


def _out_of_range(field: str, url: str, manifest: Manifest, labels: Labels, classes: int) -> str:
    first = int(np.flatnonzero(labels >= classes)[0])
    return (
        f"{field}={url}: {manifest[first].name} has label {labels[first]}, but there are {classes} classes, numbered "
        f"from 0; correct the list, or set classes={int(labels.max()) + 1}"
    )


def _by_name(train: tuple[str, ...], test: tuple[str, ...], data: ProbeDataConfig) -> Labels:
    """Map each test class to the index of the training class with the same name."""
    number = {name: i for i, name in enumerate(train)}
    unmatched = [name for name in test if name not in number]
    if unmatched:
        raise ConfigError(
            [
                f"data.test={data.test}: class folders {listed(unmatched)} do not exist in data.train={data.train}; "
                "add them there, or remove them from data.test"
            ]
        )
    return np.array([number[name] for name in test], np.int64)
