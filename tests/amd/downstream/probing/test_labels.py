from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from amd.config import ConfigError, ProbeDataConfig
from amd.downstream.probing.labels import open_labelled


def list_file(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def folders(root: Path, *names: str) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / name / "1.png")
    return str(root)


def test_classes_are_counted_from_the_training_labels(tmp_path: Path) -> None:
    train = list_file(tmp_path / "train.txt", "a.png 0", "b.png 4", "c.png 2")
    sets = open_labelled(ProbeDataConfig(train=train, test=list_file(tmp_path / "test.txt", "d.png 2")))
    assert sets.classes == 5
    assert sets.train_labels.tolist() == [0, 4, 2]
    assert sets.test_labels.tolist() == [2]


def test_class_folders_are_matched_by_name_not_by_index(tmp_path: Path) -> None:
    train, test = folders(tmp_path / "train", "ape", "cat", "dog"), folders(tmp_path / "test", "ape", "dog")
    sets = open_labelled(ProbeDataConfig(train=train, test=test))
    assert sets.test.labels.tolist() == [0, 1]
    assert sets.test_labels.tolist() == [0, 2]


MISTAKES = {
    "no label in train": (
        ("a.png 0", "b.png -1"),
        ("c.png 0",),
        None,
        "data.train=.* 1 samples have no label .*b.png",
    ),
    "no label in test": (("a.png 0", "b.png 1"), ("c.png -1",), None, "data.test=.* 1 samples have no label .*c.png"),
    "one class": (("a.png 3", "b.png 3"), ("c.png 3",), None, "data.train=.* all samples belong to class 3"),
    "train out of range": (("a.png 0", "b.png 7"), ("c.png 0",), 5, "data.train=.*b.png has label 7, .* 5 classes"),
    "test out of range": (("a.png 0", "b.png 1"), ("c.png 2",), None, "data.test=.*c.png has label 2, .* 2 classes"),
    "unknown class": (
        ("a.png 0", "b.png 3"),
        ("c.png 0", "d.png 2"),
        None,
        "data.test=.* 1 samples .*d.png of class 2",
    ),
    "missing list": (("a.png 0", "b.png 1"), None, None, "data.test: .*test.txt does not exist"),
    "empty list": (("a.png 0", "b.png 1"), (), None, "data.test: .*test.txt has no samples"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_labels_are_rejected_before_any_sample_is_read(name: str, tmp_path: Path) -> None:
    train, test, classes, message = MISTAKES[name]
    data = ProbeDataConfig(train=list_file(tmp_path / "train.txt", *train), test=str(tmp_path / "test.txt"))
    if test is not None:
        list_file(tmp_path / "test.txt", *test)
    with pytest.raises(ConfigError, match=message) as caught:
        open_labelled(data, classes)
    assert len(caught.value.problems) == 1


def test_unlabelled_samples_and_unmatched_class_folders_are_rejected(tmp_path: Path) -> None:
    train = folders(tmp_path / "train", "ape", "cat")
    with pytest.raises(ConfigError, match=r"data.test=.*1 samples have no label \(first: .*1.png"):
        open_labelled(ProbeDataConfig(train=train, test=str(tmp_path / "train" / "ape")))
    with pytest.raises(ConfigError, match="class folders cow do not exist in"):
        open_labelled(ProbeDataConfig(train=train, test=folders(tmp_path / "test", "ape", "cow")))
