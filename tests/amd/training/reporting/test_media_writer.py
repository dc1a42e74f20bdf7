"""Tests for the number, size and content of a tiny run's pictures, which must never change or stop the run."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from amd.config import TrainConfig
from amd.data.dataset.open import open_manifest
from amd.models.student import Student
from amd.storage import StorageUnreachable, join, listdir, write_bytes
from amd.training.process_group import ProcessGroup
from amd.training.reporting import media_writer
from amd.training.reporting.media_files import MAX_BYTES, MAX_STEPS, PICTURES, media_steps, read_picture, step_url
from amd.training.reporting.media_writer import MAX_WAITING, MediaWriter, picture_steps, read_samples
from amd.training.reporting.metrics import StepImages
from amd.training.reporting.progress import Event
from amd.training.run_folder import spec_of
from amd.training.trainer.pretraining import work
from tests.support.runs.tiny_runs import NullHooks, assert_same_bits, final_state, tiny_run


class WarningHooks(NullHooks):
    """Hooks that record warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def emit(self, event: Event) -> None:
        if event["kind"] == "warning":
            self.warnings.append(event["text"])


def train(config: TrainConfig, hooks: NullHooks | None = None, until: int | None = None) -> str:
    assert config.storage is not None
    assert config.name is not None
    spec = spec_of(config.name, config.storage, config, "", until)
    work(spec, ProcessGroup(), hooks or NullHooks())
    return spec.folder


def open_writer(config: TrainConfig, folder: Path) -> tuple[MediaWriter, Student, list[StepImages]]:
    torch.manual_seed(0)
    student, tracked = Student(config), list[StepImages]()
    return MediaWriter(str(folder), config, student, open_manifest(config.data), tracked.append), student, tracked


@pytest.mark.slow
def test_a_paused_run_with_pictures_is_bit_identical_to_a_run_without_pictures(tmp_path: Path) -> None:
    pictured = tiny_run(tmp_path, name="pictured", checkpoint__pin_steps=[2, 9], tracking__tensorboard=True)
    train(pictured, until=6)
    folder = train(pictured)
    plain = tiny_run(tmp_path, name="plain", checkpoint__pin_steps=[2, 9], media__samples=0)
    assert_same_bits(final_state(folder, pictured), final_state(train(plain), plain))
    assert [found.step for found in media_steps(folder)] == [2, 9]
    assert not Path(folder).parent.joinpath("plain", "media").exists()
    images = EventAccumulator(join(folder, "tensorboard"))
    images.Reload()
    assert {event.step for event in images.Images("media/rebuilt")} == {2, 9}  # one file per start, in any order


def test_pictures_show_the_input_and_its_reconstruction(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    writer, student, tracked = open_writer(config, tmp_path)
    writer.write(5, student)
    writer.close(wait=True)
    (found,) = media_steps(str(tmp_path))
    assert found.step == 5
    assert all(0 < size <= MAX_BYTES for size in found.sizes.values())
    sheets = [np.asarray(Image.open(io.BytesIO(read_picture(str(tmp_path), 5, name)))) for name in PICTURES]
    height, width = config.clip.size
    assert {sheet.shape for sheet in sheets} == {(height, 8 * width, 3)}
    clips = read_samples(open_manifest(config.data), config.data, config.clip, 8)
    assert np.array_equal(sheets[0], torch.cat(list(clips[:, :, 0]), dim=2).permute(1, 2, 0).numpy())
    assert len({sheet.tobytes() for sheet in sheets}) == 3
    assert [(images.step, [*images.images]) for images in tracked] == [
        (5, ["media/input", "media/student", "media/rebuilt"])
    ]


def test_pictures_leave_the_student_and_the_random_generator_unchanged(tmp_path: Path) -> None:
    writer, student, _ = open_writer(tiny_run(tmp_path), tmp_path)
    student.train()
    state = {name: value.clone() for name, value in student.state_dict().items()}
    before = torch.get_rng_state()
    writer.write(1, student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()  # training continues while the pictures are drawn
    writer.close(wait=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in student.modules())
    student.load_state_dict(state)
    same, _, _ = open_writer(tiny_run(tmp_path), tmp_path / "again")
    same.write(1, student)
    same.close(wait=True)
    assert read_picture(str(tmp_path), 1, "rebuilt.webp") == read_picture(str(tmp_path / "again"), 1, "rebuilt.webp")


def test_storage_errors_lose_pictures_but_do_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, data: bytes) -> None:
        raise StorageUnreachable(f"{url}: the store has not responded")

    monkeypatch.setattr(media_writer, "write_bytes", refuse)
    hooks = WarningHooks()
    config = tiny_run(tmp_path, name="failing", checkpoint__pin_steps=[2, 9])
    folder = train(config, hooks)
    assert media_steps(folder) == []
    shown = [text for text in hooks.warnings if "pictures were not written" in text]
    assert len(shown) == 2
    assert "has not responded" in shown[0]
    assert "2 steps without pictures so far" in shown[1]


def test_slow_storage_does_not_block_steps_and_the_queue_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responds, called = threading.Event(), threading.Event()

    def write_slowly(url: str, data: bytes) -> None:
        called.set()
        responds.wait(60)
        write_bytes(url, data)

    monkeypatch.setattr(media_writer, "write_bytes", write_slowly)
    writer, student, _ = open_writer(tiny_run(tmp_path), tmp_path)
    writer.write(1, student)
    assert called.wait(60)
    for step in range(2, 12):
        writer.write(step, student)  # returns although nothing has been stored yet
    dropped = 10 - MAX_WAITING
    assert (writer.written, writer.failed) == (0, dropped)
    assert len(writer.warnings()) == dropped
    responds.set()
    writer.close(wait=True)
    assert [found.step for found in media_steps(str(tmp_path))] == [1, 10, 11]


def test_a_stopped_run_does_not_wait_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    responds, called = threading.Event(), threading.Event()

    def write_slowly(url: str, data: bytes) -> None:
        called.set()
        responds.wait(60)

    monkeypatch.setattr(media_writer, "write_bytes", write_slowly)
    writer, student, tracked = open_writer(tiny_run(tmp_path), tmp_path)
    writer.write(1, student)
    assert called.wait(60)
    writer.write(2, student)
    writer.close(wait=False)
    responds.set()
    for thread in threading.enumerate():
        if thread.name == "media":
            thread.join(60)
    assert tracked == [], "the trackers are already closed"
    assert writer.written <= 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, []),
        ({"checkpoint__pin_steps": [4, 7, 99]}, [4, 7]),
        ({"checkpoint__pin_steps": [4], "media__samples": 0}, []),
        ({"media__every_steps": 5}, [5, 10]),
        ({"probe__data__train": "a", "probe__data__test": "b", "probe__every_epochs": 3}, [9, 12]),
        ({"checkpoint__pin_steps": [4], "objective__weights__reconstruction": 0.0}, []),
    ],
)
def test_pictures_are_written_at_probed_and_pinned_steps(
    tmp_path: Path, overrides: dict[str, Any], expected: list[int]
) -> None:
    assert picture_steps(tiny_run(tmp_path, **overrides), 12, 3) == expected


def test_the_number_of_steps_with_pictures_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = picture_steps(tiny_run(tmp_path, media__every_steps=1), 100_000, 3)
    assert (len(steps), steps[0], steps[-1]) == (MAX_STEPS, 1, 100_000)
    for step in range(1, MAX_STEPS + 4):  # written with other settings before the run resumed
        write_bytes(join(step_url(str(tmp_path), step), "input.webp"), b"")
    writer, student, _ = open_writer(tiny_run(tmp_path), tmp_path)
    writer.write(50, student)
    writer.close(wait=True)
    kept = listdir(join(str(tmp_path), "media"))
    assert len(kept) == MAX_STEPS
    assert kept[0] == "step-00000001"
    assert kept[-1] == "step-00000050"


def test_unreadable_samples_are_omitted_from_pictures(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    manifest = open_manifest(config.data)
    Path(manifest[0].location).write_bytes(b"not an image")
    assert len(read_samples(manifest, config.data, config.clip, 8)) == 7
