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


def publish_student(config: TrainConfig, root: Path, name: str) -> tuple[Student, str]:
    """Publish a student with random weights from its last checkpoint. Returns it and the folder of its encoder."""
    torch.manual_seed(0)
    student = Student(config)
    store = CheckpointStore(join(run_folder(str(root), name), "checkpoints"), config.checkpoint)
    store.save(1, Snapshot({"model": student.state_dict(), "optimizer": {}}, {}), {})
    store.wait()
    facts = DataFacts(samples=1, digest="", steps=1)
    return student, publish(config, ResolvedTeacher(config, None), str(root), name, facts)
