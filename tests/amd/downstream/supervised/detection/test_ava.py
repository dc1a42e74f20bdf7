from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amd.config import ClipConfig, ConfigError, DetectionDataConfig
from amd.data.dataset.record import Record
from amd.data.decoding.reader import BadSample, SampleReader
from amd.data.fetching.read_ahead import FileRange, frame_files
from amd.downstream.supervised.detection import ava
from amd.downstream.supervised.detection.ava import KeyFrame, KeyFrameId, KeyFrameReader
from amd.downstream.supervised.detection.data import open_data
from tests.support.data.ava_videos import DOWN, NEVER, RIGHT, draw, label_map, tiny_detection
from tests.support.data.videos import exact_frames, pictures, write_video

LABELS = ava.LabelMap({1: "stand", 12: "walk", 80: "watch"})
GOOD = "1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,12,0"


def _file(folder: Path, *lines: str) -> str:
    path = folder / "file.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_lines_for_one_person_are_merged_into_one_box_with_several_actions(tmp_path: Path) -> None:
    other = "1j20qq1JyX4,0902,0.1,0.1,0.5,0.9,1,1"
    found = ava.read_annotations("data.train", _file(tmp_path, GOOD, other, GOOD.replace(",12,", ",80,")), LABELS)
    (frame_id,) = found
    assert frame_id == KeyFrameId("1j20qq1JyX4", 902.0)
    assert str(frame_id) == "1j20qq1JyX4,0902"
    assert found[frame_id].actions == [[12, 80], [1]]
    assert found[frame_id].boxes.tolist() == [[0.002, 0.118, 0.714, 0.977], [0.1, 0.1, 0.5, 0.9]]


def test_detected_boxes_below_the_minimum_score_are_dropped(tmp_path: Path) -> None:
    lines = ["v,1,0,0,1,1,,0.79", "v,1,0,0,0.5,1,,0.80", "v,2,0,0,1,1,-1,0.1"]
    found = ava.read_boxes("data.boxes", _file(tmp_path, *lines), 0.8)
    assert {str(frame_id): persons.boxes.tolist() for frame_id, persons in found.items()} == {
        "v,0001": [[0, 0, 0.5, 1]]
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "v,1,0,0,1,1,12",
            "7 columns instead of 8; each line must have the form video,timestamp,x1,y1,x2,y2,action_id,person_id",
        ),
        ("v,t,0,0,1,1,12,0", "timestamp 't' is not a number (these files have no header line)"),
        ("v,1,0,0,1,nan,12,0", "y2 'nan' is not a number"),
        ("v,1,0,0,1.2,1,12,0", "box 0,0,1.2,1 extends outside the frame"),
        ("v,1,-0.1,0,1,1,12,0", "box -0.1,0,1,1 extends outside the frame"),
        ("v,1,0.6,0,0.4,1,12,0", "box 0.6,0,0.4,1 has no area; x1 must be below x2, and y1 below y2"),
        ("v,1,0,0,1,1,13,0", "action '13' is not in data.label_map, which contains 1, 12, 80"),
        ("v,1,0,0,1,1,,0", "action '' is not in data.label_map"),
        (",1,0,0,1,1,12,0", "the first column is empty; it must contain the name of the video"),
    ],
)
def test_an_invalid_line_is_reported(tmp_path: Path, line: str, message: str) -> None:
    url = _file(tmp_path, GOOD, line)
    with pytest.raises(ConfigError) as caught:
        ava.read_annotations("data.train", url, LABELS)
    (problem,) = caught.value.problems
    assert problem.startswith(f"data.train: {url}:2: {message}")


def test_all_invalid_lines_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ava.read_annotations("data.train", _file(tmp_path, *(["v,1,0,0,1,1,99,0"] * 50)), LABELS)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "… and 30 more"


@pytest.mark.parametrize("form", ["item", "label"])
def test_both_label_map_formats_are_read(tmp_path: Path, form: str) -> None:
    key = {"item": "id", "label": "label_id"}[form]
    lines = [f'{form} {{\n  name: "bend/bow (at the waist)"\n  {key}: 1\n  label_type: X\n}}', f"{form} {{ {key}: 3 }}"]
    url = _file(tmp_path, lines[0], lines[1].replace("{ ", '{ name: "run" '))
    found = ava.read_label_map("data.label_map", url)
    assert found.names == {1: "bend/bow (at the waist)", 3: "run"}
    assert (found.classes, found.labels()) == (3, ("bend/bow (at the waist)", "2", "run"))
    with pytest.raises(ConfigError, match="lacks a name"):
        ava.read_label_map("data.label_map", _file(tmp_path, *lines))


@pytest.mark.parametrize(
    ("break_data", "message"),
    [
        (lambda f: (f / "train.csv").unlink(), "data.train=.*train.csv: does not exist"),
        (lambda f: (f / "train.csv").write_text("\n"), "data.train=.*train.csv: contains no lines"),
        (lambda f: (f / "train.csv").write_bytes(b"\xff\xfe\x00"), "data.train=.*train.csv: cannot be read as text"),
        (lambda f: (f / "map.pbtxt").write_text("none"), "data.label_map=.*map.pbtxt: contains no items"),
        (
            lambda f: (f / "v0.mp4").unlink(),
            r"data.train=.*: 1 of 6 videos do not exist in data.root=.* \(v0\); put VIDEO",
        ),
        (lambda f: (f / "v7.mp4").unlink(), r"data.boxes=.*: 1 of 2 videos do not exist in data.root=.* \(v7\)"),
        (
            lambda f: (f / "val.csv").write_text(f"v6,1,0,0,1,1,{NEVER},0\n"),
            "data.val=.*: none of the evaluated actions",
        ),
    ],
)
def test_each_data_problem_is_reported_in_one_message(
    tmp_path: Path, break_data: Callable[[Path], Any], message: str
) -> None:
    draw(tmp_path)
    (tmp_path / "scored.pbtxt").write_text(label_map(RIGHT, DOWN))
    config = tiny_detection(tmp_path, data__evaluated=str(tmp_path / "scored.pbtxt"))
    break_data(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        open_data(config)
    assert len(caught.value.problems) == 1


def test_evaluated_actions_must_be_in_the_label_map(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "scored.pbtxt").write_text('item { name: "fly" id: 9 }')
    with pytest.raises(ConfigError, match=r"data.evaluated=.*: IDs 9 are not in data.label_map"):
        open_data(tiny_detection(tmp_path, data__evaluated=str(tmp_path / "scored.pbtxt")))


def test_excluded_key_frames_are_neither_predicted_nor_scored(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "excluded.csv").write_text("v7,0002\n")
    whole = open_data(tiny_detection(tmp_path)).val
    val = open_data(tiny_detection(tmp_path, data__excluded=str(tmp_path / "excluded.csv"))).val
    assert whole is not None
    assert val is not None
    excluded = KeyFrameId("v7", 2.0)
    assert set(whole.records.frame_ids) - set(val.records.frame_ids) == {excluded}
    assert set(whole.annotated) - set(val.annotated) == {excluded}
    assert val.digest() != whole.digest()


def test_a_clip_is_centred_on_its_key_frame_within_the_video() -> None:
    assert ava.centred(300, 100, 16, 4).tolist() == list(range(70, 131, 4))
    assert ava.centred(300, 100, 4, 1).tolist() == [98, 99, 100, 101]
    assert ava.centred(300, 5, 4, 4).tolist() == [0, 3, 7, 11]
    assert ava.centred(300, 299, 4, 4).tolist() == [293, 297, 299, 299]
    assert ava.centred(10, 7, 1, 4).tolist() == [7]


def _read(record: Record, timestamp: float, clip: ClipConfig, **data: Any) -> np.ndarray:
    config = DetectionDataConfig(train="t.csv", label_map="m.pbtxt", **data)
    reader = KeyFrameReader(clip, config)
    try:
        return reader.read_clip(KeyFrame(record, timestamp, np.zeros((0, 4))), lambda total: np.zeros(0, np.int64))
    finally:
        reader.close()


def test_a_video_is_read_at_its_native_frame_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", pictures(40), fps=10)
    record, clip, frames = (
        Record(str(path), None, "video"),
        ClipConfig(frames=4, sampling_rate_frames=2),
        exact_frames(path),
    )
    centered = [17, 19, 21, 23]  # 2 s are 20 frames
    assert (_read(record, 2.0, clip) == frames[centered]).all()
    assert (_read(record, 1.0, clip, fps=20) == frames[centered]).all()
    assert (_read(record, 902.0, clip, first_frame_s=900) == frames[centered]).all()
    with pytest.raises(BadSample, match="has no frame at 4 s: it would be frame 40 of 40"):
        _read(record, 4.0, clip)


def test_frame_folders_in_the_ava_layout_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    for n in range(1, 62):
        Image.fromarray(np.full((8, 8, 3), n, np.uint8)).save(folder / f"v_{n:06d}.png")
    (record,) = ava.find_videos("data.train", "t.csv", str(tmp_path), ["v"]).values()
    assert (record.kind, record.frames) == ("frames", 61)
    clip = ClipConfig(frames=2, sampling_rate_frames=4)
    read = _read(record, 901.0, clip, frame_name="{folder}_{:06}.png")  # 30 frames after the first, which is number 1
    assert read[:, 0, 0, 0].tolist() == [29, 33]


class RecordingChild:
    """Stands in for the decoding process; records its requests, and answers with black frames."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.requests: list[dict[str, Any]] = []

    def request(self, message: dict[str, Any], deadline: float, content: bytes | None = None) -> dict[str, Any]:
        self.requests.append(message)
        return {"shape": (len(message["indices"]), 1, 1, 3)} if "indices" in message else {}

    def shared_bytes(self, size: int) -> bytes:
        return bytes(size)

    def ensure_running(self) -> None: ...
    def release(self) -> None: ...


@pytest.mark.parametrize(("fps", "first_s"), [(None, None), (2.0, 895.0)])
def test_frames_around_key_frames_are_fetched_ahead(
    monkeypatch: pytest.MonkeyPatch, fps: float | None, first_s: float | None
) -> None:
    monkeypatch.setattr(SampleReader, "child", RecordingChild)
    data = DetectionDataConfig(train="t.csv", label_map="m.pbtxt", fps=fps, first_frame_s=first_s)
    reader = KeyFrameReader(ClipConfig(frames=4, sampling_rate_frames=2), data)
    child: Any = reader._reader._child

    def choose(total: int) -> np.ndarray:
        raise AssertionError("the frames depend on the timestamp")

    folder, outside = Record("s3://bucket/v", None, "frames", 300), Record("s3://bucket/w", None, "frames", 2)
    video = Record("s3://bucket/x.mp4", None, "video")
    frames = [KeyFrame(folder, seconds, np.zeros((0, 4))) for seconds in (901.0, 902.0)]
    beyond_the_end = KeyFrame(outside, 1800.0, np.zeros((0, 4)))
    reader.expect([(key_frame, choose) for key_frame in [frames[0], beyond_the_end, frames[1]]])
    (expected,) = child.requests
    child.requests.clear()
    for key_frame in frames:
        reader.read_clip(key_frame, choose)
    read = [
        file for request in child.requests for file in frame_files(folder.location, request["indices"], data.frame_name)
    ]
    assert len(read) == 8
    assert expected["files"] == read
    with pytest.raises(BadSample, match="has no frame at 1800 s"):
        reader.read_clip(beyond_the_end, choose)
    reader.expect([(KeyFrame(video, 901.0, np.zeros((0, 4))), choose)])
    assert child.requests[-1]["files"] == [FileRange(video.location)]


def test_a_broken_video_is_a_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(BadSample, match=r"v\.mp4 is not a video"):
        _read(Record(str(tmp_path / "v.mp4"), None, "video"), 1.0, ClipConfig())
