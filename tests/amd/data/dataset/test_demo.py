"""Tests for the demo data sets: splits, rendering, encoding and atomic writes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from multiprocessing.synchronize import Barrier
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from amd.data.dataset import demo
from amd.data.loading.processes import fork_server
from amd.downstream.arrays import Features
from amd.downstream.probing.classifiers import knn, linear, top1
from tests.support.processes import run_ranks

SPLITS = ("train", "probe", "select", "test")
MAKERS = {"images": cache(demo.image_samples), "clips": cache(demo.clip_samples)}


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(autouse=True)
def _root(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_DEMO_DIR", str(demo_dir))


@pytest.mark.parametrize("kind", MAKERS)
def test_the_select_and_test_splits_share_no_digits_with_other_splits(kind: str) -> None:
    shown = {split: set(MAKERS[kind](split).digits.tolist()) for split in SPLITS}
    trained = shown["train"] | shown["probe"]
    assert not trained & shown["select"]
    assert not trained & shown["test"]
    assert not shown["select"] & shown["test"]
    assert all(0 <= digit < 1797 for digits in shown.values() for digit in digits)


def test_images_and_clips_hold_out_the_same_digits() -> None:
    pool = {digit for make in MAKERS.values() for digit in make("train").digits.tolist()}
    held = {digit for make in MAKERS.values() for digit in make("test").digits.tolist()}
    assert not pool & held


@pytest.mark.parametrize("samples", [demo.image_samples, demo.clip_samples])
def test_samples_are_deterministic(samples: Callable[[str], demo.Samples]) -> None:
    first, second = samples("select"), samples("select")
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_evaluation_images_are_not_jittered() -> None:
    """Images averaged down to 8x8 correlate with the source digits, up to interpolation."""
    from sklearn.datasets import load_digits

    samples = demo.image_samples("select", 50)
    small = samples.pixels.reshape(50, 8, 4, 8, 4).mean(axis=(2, 4)) / 255
    source = load_digits().images[samples.digits] / 16
    for drawn, original in zip(small, source, strict=True):
        assert np.corrcoef(drawn.ravel(), original.ravel())[0, 1] > 0.9


def test_rendering_without_jitter_is_bilinear_interpolation() -> None:
    digit = np.zeros((1, 8, 8), np.float32)
    digit[0, 3, 5] = 1
    centre = np.full((1, 1, 2), 15.5)
    drawn = demo.render(digit, centre, np.array([32.0]), np.array([0.0]), wrap=False)[0, 0]
    # Pixel p maps to source coordinate (p + 0.5) / 4 - 0.5: rows 13 and 14 are 0.125 away from source row 3.
    rows, columns = (np.arange(32) + 0.5) / 4 - 0.5 - 3, (np.arange(32) + 0.5) / 4 - 0.5 - 5
    expected = np.outer(np.clip(1 - abs(rows), 0, 1), np.clip(1 - abs(columns), 0, 1)) * 255
    np.testing.assert_allclose(drawn, expected, atol=0.51)


def test_a_digit_that_leaves_the_frame_reenters_on_the_opposite_side() -> None:
    digit = np.random.default_rng(0).random((1, 8, 8), np.float32)
    side, angle = np.array([24.0]), np.array([0.1])
    middle = demo.render(digit, np.array([[[16.0, 16.0]]]), side, angle, wrap=True)[0, 0]
    corner = demo.render(digit, np.array([[[0.0, 32.0]]]), side, angle, wrap=True)[0, 0]
    np.testing.assert_array_equal(np.roll(middle, (16, 16), (0, 1)), corner)


def test_the_label_is_the_direction_of_motion() -> None:
    """The shift between two frames, estimated by circular cross-correlation, points in the labelled direction."""
    samples = demo.clip_samples("select", 64)
    steps = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}
    matches = 0
    for clip, label in zip(samples.pixels.astype(np.float64), samples.labels, strict=True):
        spectrum = np.fft.fft2(clip[2]) * np.conj(np.fft.fft2(clip[0]))
        peak = np.unravel_index(np.fft.ifft2(spectrum).real.argmax(), (32, 32))
        shift = (np.array(peak) + 16) % 32 - 16
        expected = np.sum([steps[part] for part in demo.DIRECTIONS[label].split("-")], axis=0)
        matches += np.array_equal(np.sign(np.where(abs(shift) < 1.5, 0, shift)), expected)
    assert matches >= 60


def test_motion_is_predictable_from_the_clip_but_not_from_one_frame() -> None:
    """Uses decoded files, because compression must not leak the label either. Chance level is 12.5 %."""
    known, queries = _decoded("probe", 800), _decoded("select", 600)
    for frame in (0, 4, 7):
        one = Features(known.values[:, frame], known.labels)
        for predict in (knn, linear):
            score = top1(predict(one, queries.values[:, frame]), queries.labels)
            assert score < 12.5 + 4 * 100 * np.sqrt(0.125 * 0.875 / len(queries.labels)), (
                frame,
                predict.__name__,
                score,
            )
    whole = Features(known.values.reshape(len(known.labels), -1), known.labels)
    assert top1(knn(whole, queries.values.reshape(len(queries.labels), -1)), queries.labels) > 50


def _decoded(split: str, count: int) -> Features:
    decord = pytest.importorskip("decord", reason="decord has no wheel for this platform")
    lines = Path(demo.ensure_demo("moving-digits", split)).read_text().splitlines()[:count]
    folder = Path(demo.ensure_demo("moving-digits", split)).parent
    clips = [decord.VideoReader(str(folder / line.split()[0]), num_threads=1).get_batch(range(8)) for line in lines]
    values = np.stack([clip.asnumpy()[:, ::2, ::2, 0].reshape(8, -1) for clip in clips])
    return Features(values.astype(np.float32) / 255, np.array([int(line.split()[1]) for line in lines]))


def test_clips_are_h264_files_of_eight_frames_that_match_the_rendered_frames() -> None:
    listing = Path(demo.ensure_demo("moving-digits", "select"))
    samples = demo.clip_samples("select")
    lines = listing.read_text().splitlines()
    assert len(lines) == demo.CLIPS["select"]
    for i in (0, 7, 599):
        name, label = lines[i].split()
        assert int(label) == samples.labels[i]
        with av.open(str(listing.parent / name)) as container:
            assert "mp4" in container.format.name
            assert container.streams.video[0].codec_context.name == "h264"
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == (8, 32, 32, 3)
        assert np.abs(frames - samples.pixels[i][..., None].astype(float)).mean() < 2


def test_directions_are_equally_frequent() -> None:
    for split in SPLITS:
        assert set(Counter(MAKERS["clips"](split).labels.tolist()).values()) == {demo.CLIPS[split] // 8}


def test_images_are_png_files_in_one_folder_per_label() -> None:
    folder = Path(demo.ensure_demo("digits", "test"))
    samples = demo.image_samples("test")
    files = sorted(folder.glob("*/*.png"))
    assert len(files) == demo.IMAGES["test"]
    for path in files[::40]:
        i = int(path.stem)
        assert int(path.parent.name) == samples.labels[i]
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
            np.testing.assert_array_equal(np.asarray(image)[..., 0], samples.pixels[i, 0])


def test_noise_is_independent_per_pixel_and_identical_on_every_machine() -> None:
    samples = demo.image_samples("select", 50)
    noisy = demo.add_noise(samples.pixels, "select")
    np.testing.assert_array_equal(noisy, demo.add_noise(samples.pixels, "select"))
    dark, bright = demo.GREY
    clean = dark + (bright - dark) * samples.pixels / 255
    middle = abs(clean - 0.5) < 0.1  # where brightness is not clipped
    noise = np.where(middle, noisy / 255 - clean, 0)
    assert noise[middle].std() == pytest.approx(demo.NOISE, rel=0.05)
    right, neighbours = noise[..., 1:], middle[..., 1:] & middle[..., :-1]
    assert abs(np.corrcoef(right[neighbours], noise[..., :-1][neighbours])[0, 1]) < 0.05


def test_noisy_data_sets_have_the_same_labels_as_clean_data_sets() -> None:
    def names(folder: str) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in Path(folder).glob("*/*.png"))

    clean, noisy = (demo.ensure_demo(name, "few") for name in ("digits", "noisy-digits"))
    assert names(clean) == names(noisy)
    clean, noisy = (demo.ensure_demo(name, "few") for name in ("moving-digits", "noisy-moving-digits"))
    assert Path(clean).read_text() == Path(noisy).read_text()


def test_a_second_call_writes_nothing(demo_dir: Path) -> None:
    folder = Path(demo.ensure_demo("digits", "select"))
    before = os.stat(folder).st_mtime_ns
    assert Path(demo.ensure_demo("digits", "val")) == folder  # `val` is an alias of `select`
    assert os.stat(folder).st_mtime_ns == before


def _ensure(root: Path, start: Barrier, process: int) -> None:
    os.environ["AMD_DEMO_DIR"] = str(root)
    start.wait()
    path = Path(demo.ensure_demo("digits", "test"))
    (root / f"found-{process}").write_text(f"{path} {len(list(path.glob('*/*.png')))}")


def test_concurrent_processes_create_one_complete_data_set(tmp_path: Path) -> None:
    start = fork_server().Barrier(3)
    assert run_ranks(_ensure, [(tmp_path, start, process) for process in range(3)]) == [0, 0, 0]
    found = {(tmp_path / f"found-{process}").read_text() for process in range(3)}
    assert found == {f"{tmp_path / 'digits-1' / 'test'} {demo.IMAGES['test']}"}
    assert not list((tmp_path / "digits-1").glob(".test.part-*"))


def test_the_partial_folder_of_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_DEMO_DIR", str(tmp_path))
    leftover = tmp_path / "digits-1" / ".select.part-deadbeef"
    (leftover / "0").mkdir(parents=True)
    assert len(list(Path(demo.ensure_demo("digits", "select")).glob("*/*.png"))) == demo.IMAGES["select"]
    assert not leftover.exists()


@pytest.mark.parametrize(("name", "split"), [("faces", "train"), ("digits", "dev")])
def test_the_error_for_an_unknown_name_or_split_lists_the_valid_values(name: str, split: str) -> None:
    with pytest.raises(ValueError, match=rf"demo:{name}/{split} does not exist.*moving-digits.*select"):
        demo.ensure_demo(name, split)
