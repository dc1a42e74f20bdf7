"""Tiny data, teachers and training runs. A complete run takes about a second and uses no test doubles."""

from __future__ import annotations

import os
import signal
import traceback
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from amd.config import RunConfig, TrainConfig
from amd.models.encoder import Encoder
from amd.storage import join
from amd.training.checkpoints.store import CheckpointStore
from amd.training.process_group import ProcessGroup
from amd.training.reporting.progress import Event
from amd.training.run_folder import RunSpec, spec_of
from amd.training.runs.kinds import Work
from amd.training.runs.torch_ranks import exit_at_once
from amd.training.trainer.pretraining import work
from tests.support.processes import run_ranks
from tests.support.runs.configs import tiny_image_config


def tiny_images(folder: Path, count: int = 24) -> Path:
    """Write PNG files of 20x20 noise into two class folders."""
    noise = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return folder


def tiny_teacher(path: Path, config: TrainConfig | None = None) -> Path:
    """Write random weights for the tiny teacher to a file."""
    config = config or tiny_image_config()
    assert config.teacher is not None
    torch.manual_seed(7)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values).state_dict(), path)
    return path


def tiny_run(folder: Path, **overrides: Any) -> TrainConfig:
    """Return an AMD config for 12 steps on 24 images, 3 steps per epoch, with data and teacher in `folder`.

    Override keys use __ in place of dots.
    """
    data, weights = folder / "images", folder / "teacher.safetensors"
    if not data.exists():
        tiny_images(data)
        tiny_teacher(weights)
    defaults: dict[str, Any] = {
        "data__train": str(data),
        "teacher__weights": str(weights),
        "storage": str(folder / "storage"),
        "schedule__steps": 12,
        "schedule__warmup_steps": 2,
        "tracking__log_every_steps": 2,
        "tracking__tensorboard": False,
        "scaling__threads_per_worker": 1,
        "checkpoint__every_steps": 4,
    }
    return tiny_image_config(**{**defaults, **overrides})


class NullHooks:
    """Hooks that never stop the run and ignore events."""

    def stop_requested(self) -> bool:
        return False

    def preempted(self) -> bool:
        return False

    def emit(self, event: Event) -> None:
        pass

    def stalled(self, report: str) -> None:
        pass


class KilledAtPoll(NullHooks):
    """Hooks that kill the process at the given poll of `stop_requested`.

    The loop polls once per step and once per evaluation batch.
    """

    def __init__(self, polls: int) -> None:
        self.polls_left = polls

    def stop_requested(self) -> bool:
        self.polls_left -= 1
        if not self.polls_left:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def train_in_processes(config: RunConfig, world: int, work: Work = work, killed_at_poll: int | None = None) -> str:
    """Train with `world` gloo processes, without Ray or `launch`, and return the run folder.

    The result is the reference for tests of other launchers. With `killed_at_poll`, the last rank is killed at that
    poll of `stop_requested`, and the other ranks then fail too.
    """
    assert config.storage is not None
    assert config.name is not None
    spec = spec_of(config.name, config.storage, config, "")
    rendezvous = f"file://{config.storage}.rendezvous-{uuid.uuid4().hex}"
    hooks: list[NullHooks] = [NullHooks() for _ in range(world)]
    if killed_at_poll is not None:
        hooks[-1] = KilledAtPoll(killed_at_poll)
    codes = run_ranks(_rank, [(work, spec.to_dict(), rank, world, rendezvous, hooks[rank]) for rank in range(world)])
    assert all((code == 0) == (killed_at_poll is None) for code in codes), codes
    return spec.folder


def _rank(work: Work, spec: dict[str, Any], rank: int, world: int, rendezvous: str, hooks: NullHooks) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    try:
        work(RunSpec(**spec), ProcessGroup(rank, world), hooks)
    except Exception:
        traceback.print_exc()
        exit_at_once(1)
    torch.distributed.destroy_process_group()


def final_state(run_folder: str, config: RunConfig) -> dict[str, Tensor]:
    """Return the tensors of a run's newest checkpoint, keyed by file and name."""
    newest = CheckpointStore(join(run_folder, "checkpoints"), config.checkpoint).load_newest()
    assert newest is not None
    return {f"{file}/{name}": value for file, values in newest[1].tensors.items() for name, value in values.items()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, first {different[0]}"
