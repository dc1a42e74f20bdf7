"""Tests for reading weight files: wrapped state dicts, malicious pickles, broken files, folders and S3."""

from __future__ import annotations

import argparse
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from amd.config import ConfigError
from amd.exchange.read import read_state
from amd.storage import join, write_bytes

STATE = {"blocks.0.weight": torch.arange(6.0).reshape(2, 3), "blocks.0.bias": torch.ones(2)}


def same(got: dict[str, Tensor]) -> bool:
    return set(got) == set(STATE) and all(torch.equal(got[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_bare_and_wrapped_state_dicts_are_found(tmp_path: Path, wrapper: str | None) -> None:
    torch.save({wrapper: STATE, "epoch": 3} if wrapper else STATE, tmp_path / "weights.pth")
    assert same(read_state(str(tmp_path / "weights.pth")))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_module_prefixes_are_removed(tmp_path: Path, prefix: str) -> None:
    torch.save({"model": {prefix + key: value for key, value in STATE.items()}}, tmp_path / "weights.pth")
    assert same(read_state(str(tmp_path / "weights.pth")))


def official_checkpoint() -> dict[str, Any]:
    """Return a checkpoint with the entries that official and other training scripts save next to the weights."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "model": STATE,
        "optimizer": optimizer.state_dict(),
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="base", lr=1e-3, nested=argparse.Namespace(path=Path("/data"))),
        "best": np.float64(0.5),
        "rng": [torch.get_rng_state(), random.getstate(), np.random.RandomState(0).get_state()],
        "history": np.arange(3),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_that_also_contains_python_and_numpy_objects_loads(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "official.pth"
    torch.save(official_checkpoint(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # plain torch.load rejects it
    assert same(read_state(str(path)))


def test_numpy_scalars_pickled_under_the_old_module_name_load(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": STATE, "best": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert same(read_state(str(path)))


class RunOnLoad:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("function", [os.system, eval, os.mkdir], ids=lambda function: function.__name__)
def test_a_file_that_would_run_code_is_rejected_and_no_code_runs(tmp_path: Path, function: Any, zipped: bool) -> None:
    marker, path = tmp_path / "executed", tmp_path / "bad.pth"
    arguments = {os.system: f"touch {marker}", eval: f"open({str(marker)!r}, 'w')", os.mkdir: str(marker)}
    torch.save(
        {"model": STATE, "x": RunOnLoad(function, arguments[function])},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ConfigError, match=r"bad\.pth: refused: loading would execute .*(system|eval|mkdir)"):
        read_state(str(path))
    assert not marker.exists()


def test_an_allowed_global_is_never_called(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "bad.pth"
    hidden = RunOnLoad(np.dtype, RunOnLoad(os.system, f"touch {marker}"))
    torch.save({"model": STATE, "x": hidden}, path)
    with pytest.raises(ConfigError, match="refused"):
        read_state(str(path))
    assert not marker.exists()


def test_the_error_for_a_broken_file_states_what_is_wrong(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save({"model": {"w": torch.zeros(100, 100)}}, whole)
    content = whole.read_bytes()
    torch.save({"model": {"w": torch.zeros(100, 100)}}, whole, _use_new_zipfile_serialization=False)
    legacy = whole.read_bytes()
    save_file(STATE, tmp_path / "whole.safetensors")
    tensors = (tmp_path / "whole.safetensors").read_bytes()
    broken = {
        "empty": (b"", "empty"),
        "truncated": (content[: len(content) // 2], "truncated"),
        "stub": (content[:600], "truncated"),
        "truncated legacy": (legacy[: len(legacy) // 2], "torch file|not readable"),
        "truncated safetensors": (tensors[:-3], "broken safetensors"),
        "page": (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "text": (b"hello, these are no weights at all", "neither a safetensors nor a torch file"),
        "pickle": (pickle.dumps({"model": 1}), "not readable as weights|no state dict"),
    }
    for name, (data, reason) in broken.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=reason) as caught:
            read_state(str(path), field="teacher.weights")
        assert caught.value.problems[0].startswith(f"teacher.weights={path}: ")
        assert len(caught.value.problems) == 1


def test_a_missing_file_and_a_file_without_a_state_dict_are_reported(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": [1.0]}, tmp_path / "log.pth")
    with pytest.raises(ConfigError, match="no state dict"):
        read_state(str(tmp_path / "log.pth"))
    with pytest.raises(ConfigError, match=r"weights=.*nothing\.pth: no such file"):
        read_state(str(tmp_path / "nothing.pth"))


def test_deepspeed_checkpoints_are_read_directly_or_through_the_latest_tag(tmp_path: Path) -> None:
    tag = tmp_path / "checkpoint-9"
    tag.mkdir()
    torch.save({"module": STATE, "dp_world_size": 8, "args": argparse.Namespace()}, tag / "mp_rank_00_model_states.pt")
    assert same(read_state(str(tag)))
    (tmp_path / "latest").write_text("checkpoint-9")
    assert same(read_state(str(tmp_path)))
    (tag / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="merge"):
        read_state(str(tag))


def test_a_folder_without_weights_is_reported_with_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.safetensors"):
        read_state(str(tmp_path))


def test_files_and_folders_on_s3_are_read(tmp_path: Path, s3_root: str) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(official_checkpoint(), tmp_path / "official.pth")
    for name in ("model.safetensors", "official.pth"):
        write_bytes(join(s3_root, "weights", name), (tmp_path / name).read_bytes())
        assert same(read_state(join(s3_root, "weights", name)))
    assert same(read_state(join(s3_root, "weights")))
    with pytest.raises(ConfigError, match="no such file"):
        read_state(join(s3_root, "weights", "other.pth"))
