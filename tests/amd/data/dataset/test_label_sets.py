from __future__ import annotations

from pathlib import Path

import pytest

from amd.config import DataConfig
from amd.data.dataset.label_sets import open_label_sets
from amd.data.dataset.manifest import ManifestError


def open_list(tmp_path: Path, text: str, **data: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Open a list file and return its names, the first label of each line, and all labels."""
    file = tmp_path / "list.txt"
    file.write_text(text)
    manifest, sets = open_label_sets(DataConfig(train=str(file), **data))
    assert len(sets) == len(manifest)
    numbers = range(len(manifest))
    return [manifest[i].name for i in numbers], manifest.labels.tolist(), [sets[i].tolist() for i in numbers]


def test_lines_have_a_path_and_any_number_of_labels(tmp_path: Path) -> None:
    names, first, sets = open_list(tmp_path, "a b.mp4 3,17\n\n/far/c.mp4 5\n\td.mp4  9,2,9 \r\ne.mp4 -")
    assert names == [f"{tmp_path}/a b.mp4", "/far/c.mp4", f"{tmp_path}/d.mp4", f"{tmp_path}/e.mp4"]
    assert sets == [[3, 17], [5], [2, 9], []]
    assert first == [3, 5, 2, -1]


@pytest.mark.parametrize("data", [{"format": "frame_list"}, {}], ids=["configured", "detected"])
def test_frame_folders_have_a_frame_count_before_the_labels(tmp_path: Path, data: dict[str, str]) -> None:
    names, _, sets = open_list(tmp_path, "clip 1 62 3,17\nother 7 0\n", **data)
    assert names == [f"{tmp_path}/clip 1", f"{tmp_path}/other"]
    assert sets == [[3, 17], [0]]
    manifest, _ = open_label_sets(DataConfig(train=str(tmp_path / "list.txt"), **data))
    assert (manifest[0].kind, manifest[0].frames) == ("frames", 62)


def test_the_digest_depends_on_every_label(tmp_path: Path) -> None:
    digests = set()
    for labels in ("1,2", "1,3", "1"):
        (tmp_path / "list.txt").write_text(f"a.mp4 {labels}\nb.mp4 0\n")
        digests.add(open_label_sets(DataConfig(train=str(tmp_path / "list.txt")))[1].digest())
    assert len(digests) == 3, "a different second label must change the digest"


BROKEN = {
    "a.mp4 3;17": "list.txt:1: 'a.mp4 3;17': write `path 3,17`",
    "a.mp4 1\nb.mp4 -1": "list.txt:2: 'b.mp4 -1'",
    "a.mp4 1\nb.mp4": "list.txt:2: 'b.mp4'",
    "a.mp4 3,": "list.txt:1",
    "a.mp4 ²": "list.txt:1",
    "a.mp4 99999999999999999999": "list.txt:1",
    "clip 62 1\nother 1": "list.txt:2: 'other 1': write `path total_frames 3,17`",
    "\n": "has no samples",
    "a\0b": "not a text file",
}


@pytest.mark.parametrize("text", BROKEN)
def test_an_invalid_line_is_reported(tmp_path: Path, text: str) -> None:
    with pytest.raises(ManifestError) as error:
        open_list(tmp_path, text)
    assert BROKEN[text] in str(error.value)


def test_a_long_list_of_invalid_lines_is_truncated(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as error:
        open_list(tmp_path, "a.mp4 x\n" * 500)
    assert len(error.value.problems) < 50
    assert "more" in error.value.problems[-1]


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_missing_list_or_a_folder_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError, match=r"^data\.train: .*(does not exist|is a folder; multi-label)"):
        open_label_sets(DataConfig(train=str(tmp_path / name)))
