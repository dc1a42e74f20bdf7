"""Tests for dataset/manifest.py, dataset/open.py, dataset/lists.py and validation.py: discovery, labels and errors."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from amd.config import DataConfig
from amd.data.dataset.lists import line_numbers, parse_list
from amd.data.dataset.manifest import Names
from amd.data.dataset.open import Manifest, ManifestError, open_manifest
from amd.data.decoding.reader import SampleReader
from amd.data.validation import validate_data
from amd.storage import write_bytes
from tests.support.data.damage import cut
from tests.support.data.videos import pictures, write_video

PIXEL = Image.new("RGB", (4, 4))


def _open(url: Path | str, **fields: object) -> Manifest:
    return open_manifest(DataConfig.model_validate({"train": str(url), **fields}))


def _images(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIXEL.save(folder / name)
    return folder


def _list(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _problems(url: Path | str, **fields: object) -> list[str]:
    with pytest.raises(ManifestError) as error:
        _open(url, **fields)
    return error.value.problems


def test_sorted_subfolders_of_an_image_folder_are_its_classes(tmp_path: Path) -> None:
    manifest = _open(_images(tmp_path, ["dog/b.png", "cat/x/a.JPG", "dog/a b.jpeg", ".hidden/a.png"]))
    assert [(r.location.removeprefix(f"{tmp_path}/"), r.label, r.kind) for r in manifest] == [
        ("cat/x/a.JPG", 0, "image"),
        ("dog/a b.jpeg", 1, "image"),
        ("dog/b.png", 1, "image"),
    ]
    assert manifest.classes == ("cat", "dog")


def test_a_flat_folder_has_no_labels_and_its_ignored_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    manifest = _open(_images(tmp_path, ["b.png", "a.png"]))
    assert [r.label for r in manifest] == [None, None]
    assert manifest.labels.tolist() == [-1, -1]
    assert "files with other suffixes are ignored: .txt 1" in manifest.notes[0]


def test_a_folder_that_links_to_itself_is_traversed_once(tmp_path: Path) -> None:
    (_images(tmp_path, ["a/1.png"]) / "a" / "loop").symlink_to(tmp_path)
    assert len(_open(tmp_path)) == 1


def test_the_label_comes_last_on_a_line_and_paths_may_contain_spaces(tmp_path: Path) -> None:
    path = _list(
        tmp_path / "l.csv", "\ufeffa b/c d.mp4 3\r\n\n  /abs/x.mp4\t-1\n s3://bucket/é.webm  00012 \nlast.jpg 7"
    )
    records = list(_open(path))
    assert [r.location for r in records] == [
        f"{tmp_path}/a b/c d.mp4",
        "/abs/x.mp4",
        "s3://bucket/é.webm",
        f"{tmp_path}/last.jpg",
    ]
    assert [r.label for r in records] == [3, None, 12, 7]
    assert [r.kind for r in records] == ["video", "video", "video", "image"]


def test_data_root_is_prepended_to_relative_paths(tmp_path: Path) -> None:
    path = _list(tmp_path / "l.txt", "a.mp4 0\n")
    assert _open(path, root="/data/k400/")[0].location == "/data/k400/a.mp4"
    assert _open(path, root="s3://bucket/k400")[0].location == "s3://bucket/k400/a.mp4"


def test_a_frame_list_is_detected_with_its_frame_counts(tmp_path: Path) -> None:
    record = _open(_list(tmp_path / "l.txt", "clip 1 62 140\nclip2 16 -1\n"))[0]
    assert (record.location, record.frames, record.label, record.kind) == (f"{tmp_path}/clip 1", 62, 140, "frames")


def test_every_invalid_line_is_reported_with_the_rule_it_breaks(tmp_path: Path) -> None:
    lines = ["ok.mp4 1", "nolabel.mp4", "", "x.mp4 cat", "x.mp4 1.5", "x.mp4 -3", " 4", "x.mp4 99999999999999999999"]
    path = _list(tmp_path / "l.txt", "\n".join(lines))
    problems = _problems(path, format="list")
    assert [problem.split(":")[1] for problem in problems] == ["2", "4", "5", "6", "7", "8"]
    assert all(problem.startswith(f"{path}:") and "`path label`" in problem for problem in problems)
    assert "'cat' is not an integer" in problems[1]


def test_a_frame_count_of_zero_is_reported(tmp_path: Path) -> None:
    (problem,) = _problems(_list(tmp_path / "l.txt", "a 12 0\nb 0 1\n"), format="frame_list")
    assert ":2: total_frames '0'" in problem


def test_a_long_list_of_problems_is_truncated(tmp_path: Path) -> None:
    problems = _problems(_list(tmp_path / "l.txt", "x.mp4\n" * 5000), format="list")
    assert len(problems) == 21
    assert problems[-1] == "… and 4980 more"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/none", "does not exist"),
        ("", "is empty"),
        ("{}/empty", "is a folder without images"),
        ("{}/binary.bin", "is a binary file"),
        ("{}/blank.txt", "has no samples"),
        ("{}/x-{{0..2}}.tar", "shard {}/x-0.tar does not exist"),
        ("{}/*.tar", "matches no tar shard"),
        ("nosuch://bucket/x", "no filesystem is installed for this URL"),
        ("demo:nothing", "does not exist"),
    ],
)
def test_an_invalid_data_set_raises_one_clear_error(url: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.bin").write_bytes(bytes(100))
    (tmp_path / "blank.txt").write_text("\n \n")
    assert (
        message.replace("{}", str(tmp_path))
        in _problems(url.replace("{}", str(tmp_path)).replace("{{", "{").replace("}}", "}"))[0]
    )


@given(
    st.lists(
        st.tuples(st.text(st.characters(blacklist_categories=["Cs", "Cc", "Z"]), min_size=1), st.integers(-1, 10**9)),
        min_size=1,
    ),
    st.integers(1, 40),
)
def test_parsing_a_list_does_not_depend_on_the_block_size(lines: list[tuple[str, int]], block: int) -> None:
    text = "".join(f"{path} x {label}\n" for path, label in lines).encode()
    blocks = [text[at : at + block] for at in range(0, len(text), block)]
    parsed = parse_list(blocks, "l", with_frames=False)
    assert [(parsed.names[i], label) for i, label in enumerate(parsed.labels.tolist())] == [
        (f"{path} x", label) for path, label in lines
    ]
    assert line_numbers(blocks, range(len(lines))) == {n: n + 1 for n in range(len(lines))}


def test_the_digest_depends_on_content_but_not_on_location(tmp_path: Path) -> None:
    one = _images(tmp_path / "one", ["a/1.png", "b/2.png"])
    shutil.copytree(one, tmp_path / "two")
    assert _open(one).digest() == _open(tmp_path / "two").digest()
    _images(tmp_path / "two", ["b/3.png"])
    assert _open(one).digest() != _open(tmp_path / "two").digest()


def test_the_digest_of_a_list_ignores_spacing_and_mount_point_but_not_labels(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        return _open(_list(tmp_path / "l.txt", text), format="list").digest()

    assert digest("a.mp4 1\nb.mp4 2\n") == digest("\n  a.mp4\t1\nb.mp4 2")
    assert digest("a.mp4 1\nb.mp4 2\n") != digest("a.mp4 1\nb.mp4 3\n")
    assert digest("a.mp4 1\nb.mp4 2\n") != digest("a.mp 41\nb.mp4 2\n")
    assert digest("/mnt/x/k/a.mp4 1\n/mnt/x/k/b.mp4 2\n") == digest("/data/k/a.mp4 1\n/data/k/b.mp4 2\n")


@given(st.lists(st.binary(max_size=8), max_size=30))
def test_any_string_round_trips_as_a_name(names: list[bytes]) -> None:
    stored = Names.of(names)
    assert [stored.raw(i) for i in range(len(stored))] == names


def test_records_support_negative_indices_and_check_bounds(tmp_path: Path) -> None:
    manifest = _open(_list(tmp_path / "l.txt", "a.mp4 0\nb.mp4 1\n"))
    assert manifest[-1] == manifest[1]
    with pytest.raises(IndexError):
        manifest[2]


def test_labels_are_read_only(tmp_path: Path) -> None:
    manifest = _open(_list(tmp_path / "l.txt", "a.mp4 0\n"))
    with pytest.raises(ValueError, match="read-only"):
        manifest.labels[0] = 5


def test_validate_reports_the_line_of_a_missing_file(tmp_path: Path) -> None:
    _images(tmp_path, ["a.png"])
    path = _list(tmp_path / "l.txt", "a.png 0\n\ngone.png 1\na.png 0\n")
    with pytest.raises(ManifestError) as error:
        validate_data(DataConfig(train=str(path)))
    assert error.value.problems[1].startswith(f"{path}:3: {tmp_path}/gone.png does not exist; fix the line")


def test_validate_reports_duplicates_label_gaps_and_bad_samples(tmp_path: Path) -> None:
    _images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "c.png").write_bytes(b"")
    path = _list(tmp_path / "l.txt", "a.png 0\nb.png 5\na.png 0\nc.png -1\n")
    report = validate_data(DataConfig(train=str(path), max_bad_fraction=0.25))
    assert (report.samples, report.labelled, report.classes, report.kinds) == (4, 3, 2, {"image": 4})
    text = str(report)
    assert "listed more than once" in text
    assert "labels go up to 5" in text
    assert f"{tmp_path}/c.png is empty" in text
    assert json.loads(report.model_dump_json())["samples"] == 4


def test_validate_rejects_data_with_no_readable_sample(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(ManifestError, match="none of the 1 tested samples can be read"):
        validate_data(DataConfig(train=str(tmp_path)))


def test_a_video_folder_includes_every_video_suffix_and_reports_ignored_suffixes(tmp_path: Path) -> None:
    videos = ["mp4", "MTS", "m2ts", "vob", "ogv", "asf", "f4v", "3g2", "m1v", "rm"]
    for suffix in [*videos, "swf", "SWF", "srt", "gif"]:
        (tmp_path / f"{len(list(tmp_path.iterdir()))}.{suffix}").write_bytes(b"")
    (tmp_path / "LICENSE").write_bytes(b"")
    manifest = _open(tmp_path, format="video_folder")
    assert sorted(record.location.rpartition(".")[2] for record in manifest) == sorted(videos)
    assert "files with other suffixes are ignored: .swf 2, .gif 1, .srt 1, no suffix 1" in _sorted(manifest.notes[0])


def _sorted(note: str) -> str:
    """Return the note, with suffixes that have equal counts sorted alphabetically."""
    head, _, found = note.partition("ignored: ")
    return head + "ignored: " + ", ".join(sorted(found.split(", "), key=lambda item: (-int(item[-1]), item)))


def test_an_animated_image_can_be_listed_as_a_video(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    records = _open(_list(tmp_path / "l.txt", "a.gif 0\nvideo:a.gif 1\n"))
    assert [(r.kind, r.location) for r in records] == [(k, f"{tmp_path}/a.gif") for k in ("image", "video")]
    with closing(SampleReader(DataConfig(train="x"))) as reader:
        assert [len(reader.read_clip(record, np.arange)) for record in records] == [1, 3]


def test_validate_lists_damaged_videos(tmp_path: Path) -> None:
    cut(write_video(tmp_path / "a.avi", pictures(24), codec="mpeg4"), 0.8)
    write_video(tmp_path / "b.avi", pictures(24), codec="mpeg4")
    report = validate_data(DataConfig(train=str(tmp_path)))
    assert len(report.damaged) == 1
    assert "a.avi is truncated" in report.damaged[0]
    assert "damaged, used as far as they decode: 1 of 2" in str(report)
    strict = validate_data(DataConfig(train=str(tmp_path), damage="strict", max_bad_fraction=0.5))
    assert "cannot be read, skipped in training: 1 of 2\n  " in str(strict)


def test_validate_decodes_every_image_of_a_local_folder_and_fails_where_training_would(tmp_path: Path) -> None:
    _images(tmp_path, [f"{i:03}.png" for i in range(300)])
    for i in (7, 150, 290):
        (tmp_path / f"{i:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    report = validate_data(DataConfig(train=str(tmp_path)))
    assert (report.read, [bad.partition(" ")[0] for bad in report.bad]) == (
        300,
        [f"{tmp_path}/{i}.png" for i in ("007", "150", "290")],
    )
    assert "samples decoded: 300 of 300;" in str(report)
    with pytest.raises(ManifestError) as error:
        validate_data(DataConfig(train=str(tmp_path), max_bad_fraction=0.009))
    assert error.value.problems[0] == (
        "data.train: 3 of 300 decoded samples cannot be read, more than data.max_bad_fraction=0.009 allows: "
        "fix them, remove them from the data, or raise the limit"
    )
    assert f"{tmp_path}/150.png" in error.value.problems[2]


def test_validate_decodes_a_few_videos_unless_all_are_requested(tmp_path: Path) -> None:
    first = write_video(tmp_path / "00.avi", pictures(3), codec="mpeg4")
    for i in range(1, 18):
        shutil.copy(first, tmp_path / f"{i:02}.avi")
    report = validate_data(DataConfig(train=str(tmp_path)))
    assert (report.samples, report.read) == (18, 16)
    assert "samples decoded: 16 of 18 (--all decodes every sample);" in str(report)
    assert validate_data(DataConfig(train=str(tmp_path)), decode_all=True).read == 18
    for i in range(2, 18):
        (tmp_path / f"{i:02}.avi").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"of 16 decoded samples \(of 18; --all decodes every sample\) cannot"):
        validate_data(DataConfig(train=str(tmp_path)))


def test_folders_and_lists_on_s3_open_like_local_data(s3_root: str, tmp_path: Path) -> None:
    folder = _images(tmp_path / "set", ["a/1.png", "b/2 2.png"])
    for file in folder.rglob("*.png"):
        write_bytes(f"{s3_root}/set/{file.relative_to(folder)}", file.read_bytes())
    remote, local = _open(f"{s3_root}/set"), _open(folder)
    assert [(r.location.removeprefix(s3_root), r.label) for r in remote] == [("/set/a/1.png", 0), ("/set/b/2 2.png", 1)]
    assert remote.digest() == local.digest()
    write_bytes(f"{s3_root}/set/l.txt", b"a/1.png 3\n")
    assert _open(f"{s3_root}/set/l.txt")[0].location == f"{s3_root}/set/a/1.png"
    assert validate_data(DataConfig(train=f"{s3_root}/set/l.txt")).read == 1
    assert "does not exist" in _problems(f"{s3_root}/nothing")[0]


def test_demo_data_opens_like_any_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_DEMO_DIR", str(tmp_path))
    monkeypatch.setattr(
        "amd.data.dataset.demo.ensure_demo", lambda name, split: str(_images(tmp_path / name / split, ["0/a.png"]))
    )
    assert np.array_equal(_open("demo:digits/test").labels, [0])
