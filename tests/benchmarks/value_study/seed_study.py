"""Train and score the arms of the value study for one seed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amd.config import TrainConfig
from amd.data.loading.loader import Batch
from amd.data.packaged.catalog import CATALOG
from amd.data.packaged.photos import FASHION_SELECT, read_idx
from amd.data.packaged.source import locate
from amd.downstream.embedding.features import LabelledClips
from amd.models.encoder import Encoder
from amd.models.teachers.frozen import Teacher
from amd.training.checkpoints.state import stream_seed
from amd.training.process_group import ProcessGroup
from amd.training.trainer.distiller import Distiller
from tests.benchmarks.value_study.arms import ARMS, StudyArm, Variant, config_of, teacher_config
from tests.benchmarks.value_study.scoring import ScoredData, score, take_steps

PRETRAINED, LABELLED, SELECTED, TESTED = 20_000, 5_000, 2_000, 10_000  # images
PHASES = {"select": "select", "confirm": "test"}  # split that a phase scores


class StudyData(NamedTuple):
    images: Tensor  # (n, 3, 1, 28, 28) uint8, for pre-training
    scored: ScoredData


def read_data(split: str) -> StudyData:
    source = locate("fashion-mnist", CATALOG["fashion-mnist"])
    pixels, labels = (read_idx(source / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    if split == "test":
        held, held_labels = (read_idx(source / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        held, held_labels = held[:TESTED], held_labels[:TESTED]
    else:
        held, held_labels = (part[-FASHION_SELECT:][:SELECTED] for part in (pixels, labels))
    images = _clips(pixels[:PRETRAINED])
    labelled = LabelledClips(images[:LABELLED], labels[:LABELLED].astype(np.int64))
    return StudyData(images, ScoredData(labelled, LabelledClips(_clips(held), held_labels.astype(np.int64))))


def _clips(pixels: Any) -> Tensor:
    return torch.from_numpy(pixels.copy())[:, None, None].expand(-1, 3, -1, -1, -1).contiguous()


def pretrain(config: TrainConfig, images: Tensor, teacher: Teacher | None) -> tuple[Encoder, float]:
    """Train on images in memory. Return the encoder and the CPU time of the steps in seconds."""
    learner = Distiller(config, ProcessGroup(), teacher)

    def batches() -> Iterator[Batch]:
        order, size = torch.Generator().manual_seed(stream_seed(config.seed, "order")), config.optim.batch_size
        none = torch.zeros(size, dtype=torch.int64)
        while True:
            yield Batch(images[torch.randint(len(images), (size,), generator=order)], none, none, [])

    started = time.process_time()
    take_steps(learner, config, batches())
    assert learner.health.first_bad_step() is None, "the loss is not finite"
    return learner.student.encoder.eval(), time.process_time() - started


class SeedStudy:
    """Runs the arms for one seed in order, and stores each finished run in a file."""

    def __init__(
        self, folder: Path, phase: str, seed: int, variant: Variant, probes: tuple[str, ...], until: float
    ) -> None:
        self.folder, self.phase, self.seed, self.variant = folder, phase, seed, variant
        self.probes, self.until = probes, until
        self.data = read_data(PHASES[phase])

    def run(self, arms: Iterable[str]) -> None:
        self._teacher_weights()
        if self._result("random") is None:
            config = self._config(ARMS["undistilled"], 1)
            self._store("random", Distiller(config, ProcessGroup(), None).student.encoder.eval(), config, 0.0)
        for name in arms:
            if time.time() > self.until:
                return
            if self._result(name) is None:
                self._run(name, ARMS[name])

    def _run(self, name: str, arm: StudyArm) -> None:
        steps = self.variant.steps
        if arm.as_long_as:
            own, others = self._result("undistilled"), [self._result(other) for other in arm.as_long_as]
            if own is None or None in others:
                return  # the arms that determine its length are not finished
            steps = round(steps * sum(other["seconds"] for other in others if other) / own["seconds"])
        config = self._config(arm, steps)
        teacher = None
        if config.teacher is not None:
            encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
            encoder.load_state_dict(self._teacher_weights())
            teacher = Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers))
        encoder, seconds = pretrain(config, self.data.images, teacher)
        self._store(name, encoder, config, seconds)

    def _config(self, arm: StudyArm, steps: int) -> TrainConfig:
        return config_of(arm, self.seed, self.variant.patch, steps)

    def _teacher_weights(self) -> dict[str, Tensor]:
        # A teacher does not depend on the length of the students' training.
        path = self.folder / f"teacher{self.variant._replace(steps=Variant().steps).suffix}-{self.seed}.safetensors"
        if not path.exists():
            config = teacher_config(self.seed, self.variant.patch, self.variant.teacher_steps)
            encoder, seconds = pretrain(config, self.data.images, None)
            self._store("teacher", encoder, config, seconds)
            save_file(encoder.state_dict(), path)
        return load_file(path)

    def _store(self, name: str, encoder: Encoder, config: TrainConfig, seconds: float) -> None:
        scores = score(encoder, config, self.data.scored, self.probes, self.seed)
        facts = {"arm": name, "seed": self.seed, "phase": self.phase, "steps": config.schedule.steps}
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({**facts, "seconds": seconds, "scores": scores}))
        os.replace(part, path)
        print(f"{self.phase} seed {self.seed} {name}: {scores}, {seconds:.0f} s", flush=True)

    def _result(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.phase}{self.variant.suffix}" / f"{self.seed}-{name.replace(' ', '_')}.json"


def run_seed(task: tuple[Path, str, int, Variant, tuple[str, ...], tuple[str, ...], float]) -> None:
    folder, phase, seed, variant, arms, probes, until = task
    torch.set_num_threads(1)
    if time.time() < until:
        SeedStudy(folder, phase, seed, variant, probes, until).run(arms)
