"""Resolve the `auto` device and precision for training, benchmarks, probes and inference."""

from __future__ import annotations

import torch

from amd.config import ConfigError, Device, Precision


def choose_device(device: Device) -> torch.device:
    """Return the device to use; `auto` selects a GPU if one is available.

    Raises ConfigError if cuda is requested on a machine without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["scaling.device=cuda: this machine has no CUDA device; set scaling.device to cpu or auto"])
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the precision to use; `auto` selects bf16 on GPU and fp32 on CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context for a precision. bf16 needs no loss scaling."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def use_threads(count: int) -> None:
    """Set the number of PyTorch threads for the calling thread only."""
    # Initialise this thread first: otherwise its first computation uses the count set by another thread.
    torch.get_num_threads()
    torch.set_num_threads(count)
