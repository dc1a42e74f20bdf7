"""Labels of a learning set and a scored set, checked before a sample is read: ConfigError in the user's words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from amd.config import ConfigError, ProbeDataConfig
from amd.data.dataset.manifest import Manifest, ManifestError
from amd.data.dataset.open import open_manifest
from amd.downstream.arrays import Labels


class LabelledSets(NamedTuple):
    """What a probe learns on and is scored on. Labels stand for the same classes in both."""

    known: Manifest
    asked: Manifest
    known_labels: Labels  # (n,)
    asked_labels: Labels  # (m,)
    classes: int


def open_labelled(data: ProbeDataConfig, classes: int | None = None) -> LabelledSets:
    """Both manifests of a probe. `classes`: how many there are; none: one more than the highest label learnt.

    Where both sets are folders of classes, they are matched by name.
    """
    known = open_manifest(data)
    try:
        asked = open_manifest(data, data.test)
    except ManifestError as error:
        raise ManifestError([line.replace("data.train", "data.test") for line in error.problems]) from None
    known_labels, asked_labels = known.labels, asked.labels
    _check_present("data.train", data.train, known, known_labels)
    _check_present("data.test", data.test, asked, asked_labels)
    if known.classes and asked.classes:
        asked_labels = _by_name(known.classes, asked.classes, data)[asked_labels]
    check_several(known_labels, data.train)
    count = classes or int(known_labels.max()) + 1
    if known_labels.max() >= count:
        raise ConfigError([_out_of_range("data.train", data.train, known, known_labels, count)])
    unknown = ~np.isin(asked_labels, known_labels)
    if unknown.any():
        first = int(np.flatnonzero(unknown)[0])
        if asked_labels.max() >= count:
            raise ConfigError([_out_of_range("data.test", data.test, asked, asked_labels, count)])
        raise ConfigError(
            [
                f"data.test={data.test}: {int(unknown.sum())} samples are of classes without any sample in data.train="
                f"{data.train}, the first is {asked[first].name} of class {asked_labels[first]}; add samples of it "
                "there, or leave it out here"
            ]
        )
    return LabelledSets(known, asked, known_labels, asked_labels, count)


def _check_present(field: str, url: str, manifest: Manifest, labels: Labels) -> None:
    bare = np.flatnonzero(labels < 0)
    if len(bare):
        raise ConfigError(
            [
                f"{field}={url}: {len(bare)} samples have no label, the first is {manifest[int(bare[0])].name}; a "
                "probe needs one for each: a folder for every class, or a list with lines `path label`, labels from 0"
            ]
        )


def check_several(labels: Labels, url: str) -> None:
    """Raises ConfigError where there is nothing to tell apart."""
    if len(np.unique(labels)) < 2:
        raise ConfigError(
            [f"data.train={url}: all samples are of class {labels[0]}; a probe needs two or more to tell apart"]
        )


def _out_of_range(field: str, url: str, manifest: Manifest, labels: Labels, classes: int) -> str:
    first = int(np.flatnonzero(labels >= classes)[0])
    return (
        f"{field}={url}: {manifest[first].name} has label {labels[first]}, but there are {classes} classes, numbered "
        f"from 0; mend the list, or set classes={int(labels.max()) + 1}"
    )


def _by_name(known: tuple[str, ...], asked: tuple[str, ...], data: ProbeDataConfig) -> Labels:
    """For each of the asked classes, the number of the known one of that name."""
    number = {name: i for i, name in enumerate(known)}
    strangers = [name for name in asked if name not in number]
    if strangers:
        shown = ", ".join(strangers[:5]) + (f" and {len(strangers) - 5} more" if len(strangers) > 5 else "")
        raise ConfigError(
            [
                f"data.test={data.test}: class folders {shown} are not among those of data.train={data.train}; add "
                "samples of them there, or leave them out here"
            ]
        )
    return np.array([number[name] for name in asked], np.int64)
