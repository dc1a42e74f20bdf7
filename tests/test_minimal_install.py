"""Tests that the method, training and `python -m amd.bench` need only a few packages: torch, numpy, pydantic,
safetensors, fsspec and pyyaml, plus their dependencies.

Runs in a separate process in which all other installed packages are hidden.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from amd.bench.step import PARTS

PROGRAM = r"""
import contextlib, importlib, importlib.metadata, io, json, pkgutil, re, runpy, sys
from importlib.machinery import PathFinder

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def with_requirements(names):
    found, left = set(), list(names)
    while left:
        name = normal(left.pop())
        if name not in found:
            found.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                required = importlib.metadata.requires(name) or []
                left += [re.match(r"[\w.-]+", line)[0] for line in required if "extra ==" not in line]
    return found

installed = with_requirements(["torch", "numpy", "pydantic", "safetensors", "fsspec", "pyyaml"])
owners = importlib.metadata.packages_distributions()

class OnlyTheseInstalled(PathFinder):
    # Finds nothing, rather than raising, since torch asks for some packages with find_spec.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        distributions = {normal(owner) for owner in owners.get(name.partition(".")[0], ())}
        if not distributions or distributions & (installed | {"amd-service"}):
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyTheseInstalled
for name in ("ray", "timm", "av", "decord", "PIL", "fastapi", "typer", "rich", "pyarrow", "s3fs", "sklearn",
             "matplotlib", "optuna", "torchvision", "tensorboard", "psutil", "httpx", "sqlalchemy"):
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)
        sys.exit(f"{name} must not be importable here")

import amd
missing = {}
for module in pkgutil.walk_packages(amd.__path__, "amd.", onerror=lambda name: None):
    if not module.name.endswith("__main__"):  # importing __main__ of a package runs no program, but some import torch
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = error.name.partition(".")[0]

sys.argv = ["amd.bench", "step", "--preset", "demo-video-amd", "--batch", "1", "--steps", "1", "--json"]
printed = io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
    runpy.run_module("amd.bench", run_name="__main__", alter_sys=True)
print(json.dumps({"missing": missing, "figures": json.loads(printed.getvalue())}))
"""

# Decoders run in their own process, the demo prints with rich, and detection pools regions with torchvision.
NEEDS_MORE = {
    "amd.data.decoding.containers": "av",
    "amd.data.decoding.decord_video": "av",
    "amd.data.decoding.frames": "av",
    "amd.data.decoding.images": "PIL",
    "amd.data.decoding.map_cache": "av",
    "amd.data.decoding.sequential": "av",
    "amd.data.decoding.transcode": "av",
    "amd.data.decoding.video": "av",
    "amd.data.decoding.worker": "av",
    "amd.data.packaged.catalog": "av",
    "amd.data.packaged.films": "av",
    "amd.data.packaged.photos": "PIL",
    "amd.demo": "rich",
}
DETECTION = "amd.downstream.supervised.detection."


def test_training_and_benchmarks_need_only_torch_and_five_other_packages() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    detection = {name: module for name, module in result["missing"].items() if name.startswith(DETECTION)}
    assert set(detection.values()) <= {"torchvision"}
    assert {name: module for name, module in result["missing"].items() if name not in detection} == NEEDS_MORE
    assert set(result["figures"]["share"]) == set(PARTS)
    assert result["figures"]["samples_per_s"] > 0
