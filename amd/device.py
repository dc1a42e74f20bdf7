"""Which device and which precision: `auto` resolved in one place for training, benchmarks and probes."""

from __future__ import annotations

import torch

from amd.config import ConfigError, Device, Precision


def choose_device(device: Device) -> torch.device:
    """auto: the GPU if there is one. Raises ConfigError when a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["scaling.device=cuda: this machine has no CUDA device; take scaling.device=cpu or auto"])
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """auto: bf16 on GPU, fp32 on CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """bf16 needs no loss scaling, so there is none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def use_threads(count: int) -> None:
    """Let the calling thread, and no other, compute with so many.

    Asked first, since a thread that has not computed yet would later take over what another one set last.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)
