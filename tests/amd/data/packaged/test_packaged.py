"""Tests for exporting data sets bundled with packages. Tests that need a missing package are skipped."""

from __future__ import annotations

import gzip
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from amd.config import ConfigError, DataConfig
from amd.data.dataset.open import open_manifest
from amd.data.dataset.record import Record
from amd.data.decoding.reader import SampleReader
from amd.data.packaged import ego_motion, films, photos
from amd.data.packaged.catalog import CATALOG
from amd.data.packaged.source import PackagedData, WriteOptions, write
from tests.support.data.videos import pictures, write_video

IMAGES = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2)


def installed(name: str) -> PackagedData:
    data = CATALOG[name]
    if data.locate() is None:
        pytest.skip(f"the package {data.package} is not installed")
    return data


def idx(path: Path, values: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


def frames_of(data: DataConfig, record: Record) -> np.ndarray:
    with closing(SampleReader(data)) as reader:
        return reader.read_clip(record, np.arange)


def test_an_idx_file_is_read_with_the_shape_in_its_header(tmp_path: Path) -> None:
    idx(tmp_path / "images.gz", IMAGES)
    np.testing.assert_array_equal(photos.read_idx(tmp_path / "images.gz"), IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x89PNG....", "an IDX file of bytes starts with"), (b"\0\0\x08\x01\0\0\0\x05abc", r"3 values, .* \(5,\)")],
)
def test_an_invalid_idx_file_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        photos.read_idx(tmp_path / "x.gz")


def test_images_are_written_by_split_and_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "FASHION_SELECT", 1)
    labels = np.array([9, 0, 4], np.uint8)
    source = tmp_path / "source"
    source.mkdir()
    for part in ("train", "t10k"):
        idx(source / f"{part}-images-idx3-ubyte.gz", IMAGES)
        idx(source / f"{part}-labels-idx1-ubyte.gz", labels)
    data = CATALOG["fashion-mnist"]._replace(locate=lambda: source)
    counts = write("fashion-mnist", data, tmp_path / "out", WriteOptions(None, 0))
    assert counts == {"train": 2, "select": 1, "test": 3}
    manifest = open_manifest(DataConfig(train=str(tmp_path / "out" / "test")))
    assert manifest.classes == ("ankle-boot", "coat", "t-shirt")
    found = {manifest.classes[record.label]: record for record in manifest}
    pixels = frames_of(DataConfig(train=""), found["coat"])
    np.testing.assert_array_equal(pixels[0, :, :, 0], IMAGES[2])
    assert "Licence: MIT" in (tmp_path / "out" / "README.txt").read_text()


def test_a_missing_package_is_reported_with_its_install_command(tmp_path: Path) -> None:
    data = CATALOG["ego-motion"]._replace(locate=lambda: None)
    with pytest.raises(ConfigError, match=r"the package vizdoom is not installed; run `pip install vizdoom`"):
        write("ego-motion", data, tmp_path / "out", WriteOptions(None, 0))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    data = CATALOG["films"]._replace(locate=lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"exists and is not empty; specify another folder"):
        write("films", data, tmp_path, WriteOptions(None, 0))


def test_a_failed_writer_leaves_no_files_behind(tmp_path: Path) -> None:
    def fail(source: Path, output: Path, options: WriteOptions) -> dict[str, int]:
        (output / "half").write_text("written")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write(
            "films",
            CATALOG["films"]._replace(locate=lambda: tmp_path, write=fail),
            tmp_path / "out",
            WriteOptions(None, 0),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_reversed_clips_have_opposite_labels_and_splits_share_no_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(films, "ARROW_FILMS", ("film.mp4",))
    folder = tmp_path / "datasets" / "data"
    folder.mkdir(parents=True)
    write_video(folder / "film.mp4", pictures(90, width=160, height=120), options={"crf": "1"})
    output = tmp_path / "out"
    counts = films.write_arrow_of_time(tmp_path, output, WriteOptions(None, 0))
    assert counts == {"train/list.txt": 10, "select/list.txt": 2, "test/list.txt": 2}
    data = DataConfig(train=str(output / "test" / "list.txt"))
    forwards, backwards = open_manifest(data)
    assert (forwards.label, backwards.label) == (0, 1)
    first, second = (frames_of(data, record).astype(int) for record in (forwards, backwards))
    assert np.abs(first - second[::-1]).mean() < 4
    assert np.abs(first - second).mean() > 10
    train = DataConfig(train=str(output / "train" / "list.txt"))
    frames = np.concatenate([frames_of(train, record) for record in open_manifest(train)]).astype(int)
    assert min(np.abs(frames - frame).mean(axis=(1, 2, 3)).min() for frame in first) > 4


def test_rendered_clips_show_the_labelled_motion(tmp_path: Path) -> None:
    data = installed("ego-motion")
    counts = write("ego-motion", data, tmp_path / "out", WriteOptions(12, 0))
    assert counts == {"train/list.txt": 12, "select/list.txt": 12, "test/list.txt": 12}
    config = DataConfig(train=str(tmp_path / "out" / "test" / "list.txt"))
    manifest = open_manifest(config)
    assert manifest.labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    for record in manifest:
        clip = frames_of(config, record).astype(float).mean(axis=3)
        assert clip.shape == (ego_motion.FRAMES, 120, 160)
        shift = _shift(clip[6, 40:80], clip[7, 40:80])
        if record.label in (4, 5):
            assert (shift > 0) == (ego_motion.MOTIONS[record.label] == "TURN_LEFT")


def _shift(first: np.ndarray, second: np.ndarray) -> int:
    """Return the number of pixels by which the image moved to the right."""
    shifts = range(-40, 41)
    return min(shifts, key=lambda d: np.abs(first[:, 40 - d : 120 - d] - second[:, 40:120]).mean())


@pytest.mark.parametrize("name", ["fashion-mnist", "solar-cells", "films", "arrow-of-time", "containers"])
def test_data_sets_bundled_with_installed_packages_can_be_written_and_read(tmp_path: Path, name: str) -> None:
    counts = write(name, installed(name), tmp_path / "out", WriteOptions(6, 0))
    assert min(counts.values()) >= 4
    for part in counts:
        config = DataConfig(train=str(tmp_path / "out" / part))
        manifest = open_manifest(config)
        assert len(manifest) == counts[part]
        assert (manifest.labels >= 0).all() == (CATALOG[name].labels != "none")
    assert frames_of(config, manifest[0]).ndim == 4
