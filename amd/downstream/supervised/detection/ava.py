"""Read AVA's files (annotations, detected boxes, excluded key frames, label maps) and provide key frames as records.

    annotations   video,timestamp,x1,y1,x2,y2,action,person   no header; boxes as fractions of the frame
    boxes         video,timestamp,x1,y1,x2,y2,,score          the action, if any, is ignored
    excluded      video,timestamp
    label map     item { name: "stand" id: 12 } …             or label { name: … label_id: … }

Errors are ConfigErrors that state the file, the line, the rule and how to fix it.
Shapes: k key frames, n boxes, C actions.
"""

from __future__ import annotations

import csv
import hashlib
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from amd.config import ClipConfig, ConfigError, DataConfig, DetectionDataConfig, listed
from amd.data.dataset.manifest import capped
from amd.data.dataset.record import VIDEO_SUFFIXES, FrameChooser, Record
from amd.data.decoding.reader import BadSample, ReadFacts, SampleReader
from amd.downstream.supervised.detection.boxes import Boxes
from amd.storage import filesystem, join, listdir, read_bytes

FRAME_FOLDER_FPS, FRAME_FOLDER_START_S = 30.0, 900.0  # of AVA's extracted frames

T = TypeVar("T")


class KeyFrameId(NamedTuple):
    """Identity of a key frame: video and timestamp."""

    video: str
    timestamp: float  # seconds

    def __str__(self) -> str:
        """Format as in AVA: 1j20qq1JyX4,0902."""
        whole = self.timestamp.is_integer()
        return f"{self.video},{int(self.timestamp):04d}" if whole else f"{self.video},{self.timestamp:g}"


class AvaRow(NamedTuple):
    """A parsed line from an annotation file or a file of detected boxes."""

    frame_id: KeyFrameId
    box: tuple[float, float, float, float]
    action: int  # 0: none
    person: str
    score: float


class PersonBoxes(NamedTuple):
    """Person boxes in a key frame."""

    boxes: Boxes  # (n, 4) fractions of the frame
    actions: list[list[int]]  # per box, numbered from 1; empty for detected boxes


class KeyFrame(NamedTuple):
    """A key frame as a record: source, timestamp and boxes, which are transformed along with the pixels."""

    record: Record
    timestamp: float
    boxes: Boxes

    @property
    def name(self) -> str:
        return f"{self.record.name}@{self.timestamp:g}"

    @property
    def label(self) -> None:
        return None


class KeyFrames:
    """Key frames in file order, usable as a manifest by ClipLoader."""

    def __init__(self, persons: dict[KeyFrameId, PersonBoxes], videos: dict[str, Record]) -> None:
        self.frame_ids = list(persons)
        self.persons = list(persons.values())
        self._videos = videos

    def __len__(self) -> int:
        return len(self.frame_ids)

    def __getitem__(self, number: int) -> KeyFrame:
        frame_id = self.frame_ids[number]
        return KeyFrame(self._videos[frame_id.video], frame_id.timestamp, self.persons[number].boxes)

    def digest(self) -> str:
        """Return the sha256 of IDs, boxes and actions, which is independent of where the videos are stored."""
        digest = hashlib.sha256(b"amd key frames 1\n")
        for frame_id, persons in zip(self.frame_ids, self.persons, strict=True):
            digest.update(f"{frame_id} {persons.actions}\n".encode())
            digest.update(persons.boxes.astype("<f8").tobytes())
        return digest.hexdigest()


class LabelMap(NamedTuple):
    names: dict[int, str]  # by number, from 1

    @property
    def classes(self) -> int:
        """Number of model outputs. Action i is output i - 1; gaps between action IDs are included."""
        return max(self.names)

    def labels(self) -> tuple[str, ...]:
        return tuple(self.names.get(number, str(number)) for number in range(1, self.classes + 1))


# Reading


def read_annotations(field: str, url: str, label_map: LabelMap) -> dict[KeyFrameId, PersonBoxes]:
    """Read annotations grouped by key frame; lines with the same person and box become one box with several actions."""
    return _grouped(_rows(field, url, partial(_annotation, label_map)))


def read_boxes(field: str, url: str, min_score: float) -> dict[KeyFrameId, PersonBoxes]:
    """Read detected boxes with a score of at least `min_score`, grouped by key frame."""
    return _grouped(_rows(field, url, partial(_detected, min_score)))


def read_excluded(field: str, url: str) -> set[KeyFrameId]:
    return set(_rows(field, url, _excluded))


def read_label_map(field: str, url: str) -> LabelMap:
    names: dict[int, str] = {}
    text = _read(field, url)
    for item in re.findall(r"\b(?:item|label)\s*\{([^{}]*)\}", text):
        name = re.search(r'\bname:\s*"([^"]*)"', item)
        number = re.search(r"\b(?:label_)?id:\s*(\d+)", item)
        if not name or not number or int(number[1]) < 1 or int(number[1]) in names:
            problem = "lacks a name" if not name else "needs a unique id, from 1"
            raise ConfigError([f"{field}={url}: item {{{' '.join(item.split())}}} {problem}"])
        names[int(number[1])] = name[1]
    if not names:
        raise ConfigError(
            [f'{field}={url}: contains no items; add one per action, for example item {{ name: "stand" id: 12 }}']
        )
    return LabelMap(names)


def read_evaluated(data: DetectionDataConfig, label_map: LabelMap) -> list[int]:
    """Read the IDs of the actions to score."""
    if data.evaluated is None:
        return sorted(label_map.names)
    scored = sorted(read_label_map("data.evaluated", data.evaluated).names)
    unknown = [number for number in scored if number not in label_map.names]
    if unknown:
        raise ConfigError(
            [f"data.evaluated={data.evaluated}: IDs {listed(unknown)} are not in data.label_map={data.label_map}"]
        )
    return scored


def _rows(field: str, url: str, parse: Callable[[list[str]], T | None]) -> list[T]:
    """Parse every line, dropping None results; problems from all lines are reported together."""
    rows: list[T] = []
    problems: list[str] = []
    for number, fields in enumerate(csv.reader(_read(field, url).splitlines()), start=1):
        if not fields:
            continue
        try:
            row = parse([text.strip() for text in fields])
        except ValueError as error:
            problems.append(f"{url}:{number}: {error}")
            continue
        if row is not None:
            rows.append(row)
    if problems:
        first, *others = capped(problems)
        raise ConfigError([f"{field}: {first}", *others])
    if not rows:
        raise ConfigError([f"{field}={url}: contains no lines"])
    return rows


def _read(field: str, url: str) -> str:
    try:
        return read_bytes(url).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"{field}={url}: does not exist"]) from None
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError([f"{field}={url}: cannot be read as text ({error})"]) from None


def _annotation(label_map: LabelMap, fields: list[str]) -> AvaRow:
    form = "video,timestamp,x1,y1,x2,y2,action_id,person_id"
    _columns(fields, 8, form)
    action = fields[6]
    if not action.isdecimal() or int(action) not in label_map.names:
        raise ValueError(
            f"action {action!r} is not in data.label_map, which contains {listed(sorted(label_map.names))}"
        )
    return AvaRow(_frame_id(fields), _box(fields), int(action), fields[7], 1.0)


def _detected(min_score: float, fields: list[str]) -> AvaRow | None:
    _columns(fields, 8, "video,timestamp,x1,y1,x2,y2,,score")
    score = _number("score", fields[7])
    return AvaRow(_frame_id(fields), _box(fields), 0, "", score) if score >= min_score else None


def _excluded(fields: list[str]) -> KeyFrameId:
    _columns(fields, 2, "video,timestamp")
    return _frame_id(fields)


def _columns(fields: list[str], expected: int, form: str) -> None:
    if len(fields) != expected:
        raise ValueError(f"{len(fields)} columns instead of {expected}; each line must have the form {form}")


def _frame_id(fields: list[str]) -> KeyFrameId:
    if not fields[0]:
        raise ValueError("the first column is empty; it must contain the name of the video")
    return KeyFrameId(fields[0], _number("timestamp", fields[1]))


def _box(fields: list[str]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (_number(name, text) for name, text in zip(("x1", "y1", "x2", "y2"), fields[2:6], strict=True))
    shown = ",".join(fields[2:6])
    if min(x1, y1, x2, y2) < 0 or max(x1, y1, x2, y2) > 1:
        raise ValueError(f"box {shown} extends outside the frame; use fractions of width and height, 0 to 1")
    if x1 >= x2 or y1 >= y2:
        raise ValueError(f"box {shown} has no area; x1 must be below x2, and y1 below y2")
    return x1, y1, x2, y2


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} {text!r} is not a number (these files have no header line)")
    return value


def _grouped(rows: Sequence[AvaRow]) -> dict[KeyFrameId, PersonBoxes]:
    found: dict[KeyFrameId, dict[tuple[str, tuple[float, ...]], list[int]]] = {}
    for row in rows:
        persons = found.setdefault(row.frame_id, {})
        actions = persons.setdefault((row.person, row.box), [])
        if row.action and row.action not in actions:
            actions.append(row.action)
    return {
        frame_id: PersonBoxes(np.array([box for _, box in persons]), list(persons.values()))
        for frame_id, persons in found.items()
    }


# Videos


def find_videos(field: str, url: str, root: str, names: Sequence[str]) -> dict[str, Record]:
    """Find the file or frame folder of each video under `root`."""
    entries = listdir(root)
    files = {name.rpartition(".")[0]: name for name in entries if name.lower().endswith(VIDEO_SUFFIXES)}
    folders = set(entries)
    videos: dict[str, Record] = {}
    missing: list[str] = []
    for name in names:
        if name in files:
            videos[name] = Record(join(root, files[name]), None, "video")
        elif name in folders:
            folder = join(root, name)
            videos[name] = Record(folder, None, "frames", _count(folder))
        else:
            missing.append(name)
    if missing:
        raise ConfigError(
            [
                f"{field}={url}: {len(missing)} of {len(names)} videos do not exist in data.root={root} "
                f"({listed(missing)}); put VIDEO.mp4 or a folder VIDEO of frames there, or set data.root"
            ]
        )
    return videos


def _count(folder: str) -> int:
    fs, path = filesystem(folder)
    return len(fs.ls(path, detail=False)) if fs.isdir(path) else 0


def video_root(data: DetectionDataConfig, url: str) -> str:
    return (data.root or posixpath.dirname(url) or ".").rstrip("/")


class KeyFrameReader:
    """Reads the clip around a key frame; like SampleReader, it decodes in a separate process."""

    def __init__(self, clip: ClipConfig, data: DataConfig) -> None:
        assert isinstance(data, DetectionDataConfig), "fps and first_frame_s convert seconds to frames"
        self._clip, self._data = clip, data
        self._reader = SampleReader(data)
        self._rates: dict[str, float] = {}  # cached per video file

    def expect(self, samples: Iterable[tuple[KeyFrame, FrameChooser]]) -> None:
        """Start fetching the videos of these key frames or, from frame folders, the frames around them."""
        self._reader.expect(
            (key_frame.record, self._chooser(key_frame) if key_frame.record.kind == "frames" else choose)
            for key_frame, choose in samples
        )

    def read_clip(self, key_frame: KeyFrame, choose: FrameChooser) -> npt.NDArray[np.uint8]:
        """Read (T, H, W, 3) uint8 frames around the timestamp; ignores `choose`. Raises BadSample."""
        return self._reader.read_clip(key_frame.record, self._chooser(key_frame), timeline=True)

    def _chooser(self, key_frame: KeyFrame) -> FrameChooser:
        """Return the function that chooses the frames around a timestamp. It raises BadSample if there are none.

        For a video, reads its frame rate, which raises BadSample too.
        """
        record, first = key_frame.record, self._data.first_frame_s
        if first is None:
            first = FRAME_FOLDER_START_S if record.kind == "frames" else 0.0
        centre = round((key_frame.timestamp - first) * self._frame_rate(record))

        def around(total: int) -> npt.NDArray[np.int64]:
            if not 0 <= centre < total:
                raise BadSample(
                    record, f"has no frame at {key_frame.timestamp:g} s: it would be frame {centre} of {total}"
                )
            return centred(total, centre, self._clip.frames, self._clip.sampling_rate_frames)

        return around

    @property
    def last_read(self) -> ReadFacts | None:
        return self._reader.last_read

    def close(self) -> None:
        self._reader.close()

    def _frame_rate(self, record: Record) -> float:
        if self._data.fps is not None:
            return self._data.fps
        if record.kind == "frames":
            return FRAME_FOLDER_FPS
        if record.location not in self._rates:
            self._rates[record.location] = self._reader.frame_rate(record)
        return self._rates[record.location]


def centred(total: int, centre: int, frames: int, step: int) -> npt.NDArray[np.int64]:
    """Return indices of every `step`-th frame around `centre`, repeating the first or last frame beyond the ends."""
    index = centre + (np.arange(frames, dtype=np.int64) * 2 - (frames - 1)) * step // 2
    return index.clip(0, total - 1)
