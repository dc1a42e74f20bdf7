"""Capture and restore the state of a run: model, optimizer moments and a cursor, but not the teacher.

Random generators have no state to save: every draw (order, crops, masks, stochastic depth) is a function of the seed,
the step and the position in the global batch. State is stored as named tensors and JSON, never as pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amd.training.checkpoints.store import Snapshot


def capture(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    cursor: dict[str, Any],
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Snapshot:
    """Copy the state to the host. Waits for the device only while copying, so the run continues immediately.

    `extra`: additional tensors, by file and name.
    """
    model = _copied(student.state_dict())
    moments: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                moments[f"{name}:{key}"] = _to_host(value)
    more = {file: _copied(part) for file, part in (extra or {}).items()}
    _wait_for_copies(model)
    return Snapshot({"model": model, "optimizer": moments, **more}, cursor)


def restore(student: nn.Module, optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> dict[str, Any]:
    """Load a snapshot and return its cursor. Raises KeyError or RuntimeError if the snapshot does not match."""
    student.load_state_dict(snapshot.tensors["model"])
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in snapshot.tensors["optimizer"].items():
        name, _, part = key.rpartition(":")
        moments.setdefault(name, {})[part] = value
    names = [name for group in optimizer.param_groups for name in group["names"]]
    if moments:
        blank = optimizer.state_dict()  # hyper-parameters come from the config, not from the checkpoint
        optimizer.load_state_dict({**blank, "state": {i: moments[name] for i, name in enumerate(names)}})
    return snapshot.state


def host_copy(module: nn.Module) -> dict[str, Tensor]:
    """Copy a module's state to the host."""
    copied = _copied(module.state_dict())
    _wait_for_copies(copied)
    return copied


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _to_host(value) for name, value in tensors.items()}


def _wait_for_copies(copied: Mapping[str, Tensor]) -> None:
    if any(value.is_pinned() for value in copied.values()):
        torch.cuda.synchronize()


def _to_host(value: Tensor) -> Tensor:
    value = value.detach()
    if value.device.type == "cpu":
        return value.clone(memory_format=torch.contiguous_format)
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)


def stream_seed(*parts: int | str) -> int:
    """Derive an independent seed from parts: `stream_seed(seed, "masks", step)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: torch seeds are signed
