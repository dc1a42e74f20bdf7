"""The data of a detection run: opened, and checked before anything is trained. Raises ConfigError."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from amd.config import ClipConfig, ConfigError, DataConfig, DetectionConfig
from amd.data.loading.loader import Reader
from amd.downstream.supervised.detection import ava
from amd.downstream.supervised.detection.ava import KeyFrames, LabelMap, Moment, Persons
from amd.downstream.supervised.detection.metric import Annotated


@dataclass(frozen=True)
class Scene:
    """The key frames of data.val: what is looked at, and what is true."""

    url: str
    looked_at: KeyFrames
    """With the boxes that are classified: a detector's, or the annotated ones."""
    annotated: dict[Moment, Persons]
    """All key frames that are scored; one that no detector box is in counts as missed."""

    @property
    def digest(self) -> str:
        return self.looked_at.digest()

    def truth(self, numbers: dict[Moment, int]) -> Annotated:
        """With key frames by number."""
        rows = [
            (numbers[moment], box, action)
            for moment, persons in self.annotated.items()
            for box, actions in zip(persons.boxes, persons.actions, strict=True)
            for action in actions
        ]
        frames, boxes, actions = zip(*rows, strict=True) if rows else ((), np.zeros((0, 4)), ())
        return Annotated(np.array(frames, np.int64), np.array(boxes), np.array(actions, np.int64))

    def numbers(self) -> dict[Moment, int]:
        """Every key frame's number: those looked at come first, as in their manifest."""
        every = dict.fromkeys([*self.looked_at.moments, *self.annotated])
        return {moment: number for number, moment in enumerate(every)}


@dataclass(frozen=True)
class DetectionData:
    label_map: LabelMap
    evaluated: list[int]
    train: KeyFrames
    scene: Scene | None

    def digest(self) -> str:
        return "-".join([self.train.digest(), *([self.scene.digest] if self.scene else [])])


def open_data(config: DetectionConfig) -> DetectionData:
    data = config.data
    label_map = ava.read_label_map("data.label_map", data.label_map)
    evaluated = ava.read_evaluated(data, label_map)
    train = _key_frames(config, "data.train", data.train, ava.read_annotations("data.train", data.train, label_map))
    return DetectionData(label_map, evaluated, train, _open_scene(config, label_map, evaluated))


def _open_scene(config: DetectionConfig, label_map: LabelMap, evaluated: list[int]) -> Scene | None:
    data = config.data
    if data.val is None:
        return None
    annotated = ava.read_annotations("data.val", data.val, label_map)
    excluded = ava.read_excluded("data.excluded", data.excluded) if data.excluded else set()
    annotated = {moment: persons for moment, persons in annotated.items() if moment not in excluded}
    scored = {action for persons in annotated.values() for actions in persons.actions for action in actions}
    if not scored & set(evaluated):
        raise ConfigError([f"data.val={data.val}: none of the evaluated actions is annotated in it; nothing to score"])
    field, url, shown = "data.val", data.val, annotated
    if data.boxes is not None:
        field, url = "data.boxes", data.boxes
        found = ava.read_boxes(field, url, config.evaluation.min_score)
        shown = {moment: persons for moment, persons in found.items() if moment not in excluded}
    return Scene(data.val, _key_frames(config, field, url, shown), annotated)


def _key_frames(config: DetectionConfig, field: str, url: str, persons: dict[Moment, Persons]) -> KeyFrames:
    names = sorted({moment.video for moment in persons})
    return KeyFrames(persons, ava.find_videos(field, url, ava.root_of(config.data, url), names))


def reader_of(clip: ClipConfig) -> Callable[[DataConfig], Reader]:
    """What opens readers in the reading processes."""
    return partial(ava.KeyFrameReader, clip)
