"""Read tensors from safetensors and torch files without executing code.

Unwraps state dicts: the keys `model`, `module` and `state_dict`, DeepSpeed folders, DataParallel prefixes. Does not
interpret keys.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from amd.config import ConfigError
from amd.downloads import shared_copy
from amd.storage import StorageError, filesystem, join, listdir, read_bytes

# Files tried in a folder, in this order: our artifact, Hugging Face, DeepSpeed.
FOLDER_FILES = (
    "encoder.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "mp_rank_00_model_states.pt",
)
INDEX = ".index.json"  # Hugging Face: maps each tensor to the file that contains it
WRAPPERS = ("model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning

ALLOWED = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Objects that training scripts pickle along with weights. None is constructed; a `_Placeholder` replaces each."""


class _Placeholder:
    """Replaces a pickled object that is not a tensor; accepts and discards any arguments and state."""

    def __new__(cls, *_: object, **__: object) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_state(url: str, *, field: str = "weights") -> dict[str, Tensor]:
    """Read the state dict from a weights file or folder onto the CPU, with wrapper prefixes removed from the keys.

    `url`: a safetensors or torch file, or a folder that contains one, at any fsspec URL.
    `field`: config field to report in error messages.
    Raises ConfigError if the file is missing or broken, contains no weights, or would execute code.
    """
    url = _file_of(url, field)
    if url.endswith(INDEX):
        return _read_shards(url, field)
    return _unwrap(_read(_local_copy(url, field), url, field), url, field)


def _read_shards(index: str, field: str) -> dict[str, Tensor]:
    """Read all shards listed in a Hugging Face index; every tensor it lists must be present."""
    try:
        files = dict(json.loads(read_bytes(index))["weight_map"])
        shards = {Path(str(name)).name for name in files.values()}  # only files next to the index
    except (ValueError, TypeError, KeyError):
        raise ConfigError([f"{field}={index}: not a valid weight-file index; download it again"]) from None
    tensors: dict[str, Tensor] = {}
    for shard in sorted(shards):
        tensors |= read_state(posixpath.join(posixpath.dirname(index), shard), field=field)
    if missing := sorted(set(files) - set(tensors)):
        raise ConfigError(
            [
                f"{field}={index}: {len(missing)} tensors listed in the index are missing from its files "
                f"(first: {missing[0]})"
            ]
        )
    return tensors


def _file_of(url: str, field: str) -> str:
    try:
        fs, path = filesystem(url)
        if not fs.exists(path):
            raise ConfigError([f"{field}={url}: no such file or folder; check the path"])
        if not fs.isdir(path):
            return url
        names = listdir(url)
        if "latest" in names:  # DeepSpeed: the name of the newest tag's folder
            return _file_of(join(url, Path(read_bytes(join(url, "latest")).decode().strip()).name), field)
    except (ConfigError, StorageError):
        raise
    except Exception as error:  # each backend raises its own exceptions
        raise _unreadable(url, field, error) from None
    if "mp_rank_01_model_states.pt" in names:
        raise ConfigError(
            [f"{field}={url}: the weights are split across model-parallel ranks; merge them into one file"]
        )
    for name in FOLDER_FILES:
        if name in names:
            return join(url, name)
    raise ConfigError(
        [f"{field}={url}: the folder contains none of {', '.join(FOLDER_FILES)}; pass the path to the weights file"]
    )


def _local_copy(url: str, field: str) -> Path:
    try:
        return shared_copy(url)
    except StorageError:
        raise
    except Exception as error:  # each backend raises its own exceptions
        raise _unreadable(url, field, error) from None


def _unreadable(url: str, field: str, error: Exception) -> ConfigError:
    return ConfigError(
        [f"{field}={url}: cannot be read ({type(error).__name__}: {error}); check the path and the credentials"]
    )


def _read(path: Path, url: str, field: str) -> Any:
    """Read a file, detecting its format from the content, since published files use many different suffixes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise _unreadable(url, field, error) from None
    if size == 0:
        raise ConfigError([f"{field}={url}: the file is empty; download or copy it again"])
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ConfigError([f"{field}={url}: this is a web page, not weights; the download returned HTML"])
    if text.startswith(b"version https://git-lfs"):
        raise ConfigError(
            [f"{field}={url}: this is a Git LFS pointer, not weights; fetch the file with `git lfs pull`"]
        )
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(path, url, field, mmap=True)
    if head.startswith(b"\x80"):
        return _read_torch(path, url, field, mmap=False)
    if head[8:9] == b"{":
        return _read_safetensors(path, url, field)
    raise ConfigError([f"{field}={url}: neither a safetensors nor a torch file; convert it to one of these"])


def _read_safetensors(path: Path, url: str, field: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigError([f"{field}={url}: a broken safetensors file ({error}); download or copy it again"]) from None


def _read_torch(path: Path, url: str, field: str, *, mmap: bool) -> Any:
    placeholders: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Placeholder, name) for name in ALLOWED]
    try:
        with torch.serialization.safe_globals(placeholders):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a broken or malicious pickle can raise anything
        raise ConfigError([f"{field}={url}: {_torch_reason(str(error))}"]) from None


def _torch_reason(message: str) -> str:
    if found := re.search(r"GLOBAL (\S+)", message):
        return (
            f"refused: loading would execute {found[1]}, but weights need no code; "
            "if you trust the source, load the file yourself and save only its state dict, as safetensors"
        )
    if "TorchScript" in message or "torch.jit" in message:
        return "a TorchScript archive; save the model's state_dict() instead"
    if "central directory" in message or "PytorchStreamReader" in message or "EOF" in message or not message:
        return "a broken or truncated torch file; download or copy it again"
    reason = message.split("\n")[0].split(". ")[0][:200]
    return f"not readable as weights ({reason}); download it again, or save only its state dict, as safetensors"


def _unwrap(content: Any, url: str, field: str) -> dict[str, Tensor]:
    state = content
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping) and _tensors(content[name]):
            state = content[name]
            break
    tensors = _tensors(state) if isinstance(state, Mapping) else {}
    if not tensors:
        raise ConfigError(
            [f"{field}={url}: no state dict at the top level or under {', '.join(WRAPPERS)}; save model.state_dict()"]
        )
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _tensors(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the dense tensors in a mapping, detached and keyed by name."""
    return {
        key: value.detach()
        for key, value in values.items()
        if isinstance(key, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    }
