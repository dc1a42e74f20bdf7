"""Students published with their decoders, as a training run publishes them."""

from __future__ import annotations

from pathlib import Path

import torch

from amd.config import TrainConfig
from amd.models.student import Student
from amd.storage import join
from amd.training.checkpoints.store import CheckpointStore, Snapshot
from amd.training.run_folder import run_folder
from amd.training.runs.checks import DataFacts
from amd.training.runs.publishing import publish
from amd.training.runs.teachers import ResolvedTeacher


def save_checkpoint(config: TrainConfig, root: Path, name: str, step: int = 1) -> Student:
    """Save a checkpoint of a student with random weights, which depend on the step."""
    torch.manual_seed(step)
    student = Student(config)
    store = CheckpointStore(join(run_folder(str(root), name), "checkpoints"), config.checkpoint)
    store.save(step, Snapshot({"model": student.state_dict(), "optimizer": {}}, {}), {})
    store.wait()
    return student


def publish_student(config: TrainConfig, root: Path, name: str, data_digest: str = "") -> tuple[Student, str]:
    """Publish a student with random weights from its last checkpoint. Returns the student and its encoder folder."""
    student = save_checkpoint(config, root, name)
    facts = DataFacts(samples=1, digest=data_digest, steps=1)
    return student, publish(config, ResolvedTeacher(config, None), str(root), name, facts)
