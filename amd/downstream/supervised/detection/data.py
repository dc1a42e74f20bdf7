"""Open and check the data of a detection run before training. Raises ConfigError for invalid data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from amd.config import ClipConfig, ConfigError, DataConfig, DetectionConfig
from amd.data.loading.clip_dataset import Reader
from amd.downstream.supervised.detection import ava
from amd.downstream.supervised.detection.ava import KeyFrameId, KeyFrames, LabelMap, PersonBoxes
from amd.downstream.supervised.detection.frame_map import AnnotatedActions


@dataclass(frozen=True)
class EvaluationSet:
    """Key frames in data.val: the frames to predict, and their ground truth."""

    url: str
    records: KeyFrames
    """Key frames with the boxes to classify, either detected or annotated."""
    annotated: dict[KeyFrameId, PersonBoxes]
    """All scored key frames; those without a detected box count as missed."""

    @property
    def field(self) -> str:
        return "data.val"

    def digest(self) -> str:
        return self.records.digest()

    def truth(self, numbers: dict[KeyFrameId, int]) -> AnnotatedActions:
        """Return the ground truth, with key frames identified by number."""
        rows = [
            (numbers[frame_id], box, action)
            for frame_id, persons in self.annotated.items()
            for box, actions in zip(persons.boxes, persons.actions, strict=True)
            for action in actions
        ]
        frames, boxes, actions = zip(*rows, strict=True) if rows else ((), np.zeros((0, 4)), ())
        return AnnotatedActions(np.array(frames, np.int64), np.array(boxes), np.array(actions, np.int64))

    def numbers(self) -> dict[KeyFrameId, int]:
        """Number all key frames: first the ones to predict, in manifest order, then the rest."""
        every = dict.fromkeys([*self.records.frame_ids, *self.annotated])
        return {frame_id: number for number, frame_id in enumerate(every)}


@dataclass(frozen=True)
class DetectionData:
    label_map: LabelMap
    evaluated: list[int]
    train: KeyFrames
    val: EvaluationSet | None

    def digest(self) -> str:
        return "-".join([self.train.digest(), *([self.val.digest()] if self.val else [])])


def open_data(config: DetectionConfig) -> DetectionData:
    data = config.data
    label_map = ava.read_label_map("data.label_map", data.label_map)
    evaluated = ava.read_evaluated(data, label_map)
    train = _key_frames(config, "data.train", data.train, ava.read_annotations("data.train", data.train, label_map))
    return DetectionData(label_map, evaluated, train, _open_val(config, label_map, evaluated))


def _open_val(config: DetectionConfig, label_map: LabelMap, evaluated: list[int]) -> EvaluationSet | None:
    data = config.data
    if data.val is None:
        return None
    annotated = ava.read_annotations("data.val", data.val, label_map)
    excluded = ava.read_excluded("data.excluded", data.excluded) if data.excluded else set()
    annotated = {frame_id: persons for frame_id, persons in annotated.items() if frame_id not in excluded}
    scored = {action for persons in annotated.values() for actions in persons.actions for action in actions}
    if not scored & set(evaluated):
        raise ConfigError([f"data.val={data.val}: none of the evaluated actions is annotated; change data.evaluated"])
    field, url, shown = "data.val", data.val, annotated
    if data.boxes is not None:
        field, url = "data.boxes", data.boxes
        found = ava.read_boxes(field, url, config.evaluation.min_score)
        shown = {frame_id: persons for frame_id, persons in found.items() if frame_id not in excluded}
    return EvaluationSet(data.val, _key_frames(config, field, url, shown), annotated)


def _key_frames(config: DetectionConfig, field: str, url: str, persons: dict[KeyFrameId, PersonBoxes]) -> KeyFrames:
    names = sorted({frame_id.video for frame_id in persons})
    return KeyFrames(persons, ava.find_videos(field, url, ava.video_root(config.data, url), names))


def reader_of(clip: ClipConfig) -> Callable[[DataConfig], Reader]:
    """Return a factory that creates readers in the loader processes."""
    return partial(ava.KeyFrameReader, clip)
