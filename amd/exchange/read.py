"""Tensors out of weight files, and nothing else: safetensors, or torch files through a reader that executes nothing.

Knows how files wrap a state dict (`model`, `module`, `state_dict`, a DeepSpeed folder, a DataParallel prefix);
knows nothing of what the keys mean.
"""

from __future__ import annotations

import json
import posixpath
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from amd.config import ConfigError
from amd.storage import StorageError, filesystem, is_remote, join, listdir, read_bytes

# Tried in this order in a folder: our artifact, Hugging Face, DeepSpeed.
FOLDER_FILES = (
    "encoder.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "mp_rank_00_model_states.pt",
)
INDEX = ".index.json"  # Hugging Face: which file of several holds which tensor
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
"""What training scripts are known to pickle beside weights. None of it is built: each becomes a `_Hole`."""


class _Hole:
    """Stands where a file pickled an object that is not weights; takes any arguments and state, keeps none."""

    def __new__(cls, *_: object, **__: object) -> _Hole:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_state(url: str) -> dict[str, Tensor]:
    """The state dict of a weight file or folder, on CPU, keys as in the file but for wrapping prefixes.

    `url`: a safetensors or torch file, or a folder with one, anywhere fsspec reads.
    Raises ConfigError, naming the file and the remedy, when it is missing, broken, not weights, or asks for code.
    """
    url = _file_of(url)
    if url.endswith(INDEX):
        return _read_shards(url)
    with _local_copy(url) as path:
        return _unwrap(_read(path, url), url)


def _read_shards(index: str) -> dict[str, Tensor]:
    """The tensors of all files that an index names, each of which must hold what the index says."""
    try:
        places = dict(json.loads(read_bytes(index))["weight_map"])
        shards = {Path(str(name)).name for name in places.values()}  # beside the index, never elsewhere
    except (ValueError, TypeError, KeyError):
        raise ConfigError([f"weights {index}: not an index of weight files; download it again"]) from None
    tensors: dict[str, Tensor] = {}
    for shard in sorted(shards):
        tensors |= read_state(posixpath.join(posixpath.dirname(index), shard))
    if missing := sorted(set(places) - set(tensors)):
        raise ConfigError(
            [f"weights {index}: {len(missing)} tensors of the index are in none of its files, such as {missing[0]}"]
        )
    return tensors


def _file_of(url: str) -> str:
    try:
        fs, path = filesystem(url)
        if not fs.exists(path):
            raise ConfigError([f"weights {url}: no such file or folder; check the path"])
        if not fs.isdir(path):
            return url
        names = listdir(url)
        if "latest" in names:  # DeepSpeed: the name of the newest tag's folder
            return _file_of(join(url, Path(read_bytes(join(url, "latest")).decode().strip()).name))
    except (ConfigError, StorageError):
        raise
    except Exception as error:  # any backend raises its own kinds
        raise _unreadable(url, error) from None
    if "mp_rank_01_model_states.pt" in names:
        raise ConfigError([f"weights {url}: split over several model-parallel ranks; merge them into one file first"])
    for name in FOLDER_FILES:
        if name in names:
            return join(url, name)
    raise ConfigError([f"weights {url}: the folder holds none of {', '.join(FOLDER_FILES)}; name the file itself"])


@contextmanager
def _local_copy(url: str) -> Iterator[Path]:
    fs, path = filesystem(url)
    if not is_remote(url):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="amd-weights-") as folder:
        local = Path(folder) / "weights"
        try:
            fs.get_file(path, str(local))
        except Exception as error:  # any backend raises its own kinds
            raise _unreadable(url, error) from None
        yield local


def _unreadable(url: str, error: Exception) -> ConfigError:
    return ConfigError(
        [f"weights {url}: cannot be read ({type(error).__name__}: {error}); check the path and the credentials"]
    )


def _read(path: Path, url: str) -> Any:
    """By content, not by name: released files carry every suffix."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise _unreadable(url, error) from None
    if size == 0:
        raise ConfigError([f"weights {url}: the file is empty; download or copy it again"])
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ConfigError([f"weights {url}: this is a web page, not weights; a download was answered by a page"])
    if text.startswith(b"version https://git-lfs"):
        raise ConfigError(
            [f"weights {url}: this is a Git LFS pointer, not weights; fetch the file with `git lfs pull`"]
        )
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(path, url, mmap=True)
    if head.startswith(b"\x80"):
        return _read_torch(path, url, mmap=False)
    if head[8:9] == b"{":
        return _read_safetensors(path, url)
    raise ConfigError([f"weights {url}: neither a safetensors nor a torch file; convert it to one of them"])


def _read_safetensors(path: Path, url: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigError([f"weights {url}: a broken safetensors file ({error}); download or copy it again"]) from None


def _read_torch(path: Path, url: str, mmap: bool) -> Any:
    holes: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Hole, name) for name in ALLOWED]
    try:
        with torch.serialization.safe_globals(holes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a broken or hostile pickle raises whatever it likes
        raise ConfigError([f"weights {url}: {_torch_reason(str(error))}"]) from None


def _torch_reason(message: str) -> str:
    if found := re.search(r"GLOBAL (\S+)", message):
        return (
            f"refused, the file wants {found[1]} to be run or built on loading, and weights need no code; "
            "if you trust where it comes from, load it there and save its state dict alone, as safetensors"
        )
    if "TorchScript" in message or "torch.jit" in message:
        return "a TorchScript archive; save the model's state_dict() instead"
    if "central directory" in message or "PytorchStreamReader" in message or "EOF" in message or not message:
        return "a broken or truncated torch file; download or copy it again"
    reason = message.split("\n")[0].split(". ")[0][:200]
    return f"not readable as weights ({reason}); download it again, or save its state dict alone, as safetensors"


def _unwrap(content: Any, url: str) -> dict[str, Tensor]:
    state = content
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping) and _tensors(content[name]):
            state = content[name]
            break
    tensors = _tensors(state) if isinstance(state, Mapping) else {}
    if not tensors:
        raise ConfigError(
            [f"weights {url}: holds no state dict, bare or under {', '.join(WRAPPERS)}; save model.state_dict() as one"]
        )
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _tensors(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The dense tensors of a dict by name, out of any file mapping."""
    return {
        key: value.detach()
        for key, value in values.items()
        if isinstance(key, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    }
