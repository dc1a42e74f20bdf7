"""Tests for the container images: their contents are pinned and complete."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
HEAVY = {"torch", "torchvision", "timm", "decord", "av", "scikit-learn", "matplotlib", "pyarrow", "transformers"}

# Hides packages that the image lacks, then imports every module that the control plane may import.
CONTROL_PLANE_IMPORTS = """
import importlib, importlib.metadata, pkgutil, sys
from importlib.machinery import PathFinder
locked = set(sys.argv[1].split())
of_module = importlib.metadata.packages_distributions()
normal = lambda name: name.lower().replace("_", "-").replace(".", "-")
class OnlyTheImage:
    def find_spec(self, name, path=None, target=None):
        owners = {normal(owner) for owner in of_module.get(name.partition(".")[0], ())}
        if owners and not owners & (locked | {"amd-service"}):
            found = PathFinder.find_spec(name, path)
            if found and "/ray/thirdparty_files/" in str(found.origin):
                return None  # Ray bundles a copy
            raise ModuleNotFoundError(f"{name} is not in the control plane's image", name=name)
sys.meta_path.insert(0, OnlyTheImage())
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    sys.exit("torch must not be importable here")

import amd.artifacts.card, amd.config, amd.flops, amd.artifacts.model_card, amd.storage
import amd.commands, amd.presets.load
import tune_spaces.config
import service
from ray.job_submission import JobSubmissionClient
for module in pkgutil.walk_packages(service.__path__, "service."):
    # Importing migrations or __main__ would run them. Modules that serve encoders run only on Ray nodes.
    if module.name.startswith("service.db.migrations.") or module.name.endswith("__main__"):
        continue
    if module.name != "service.serve" and not module.name.startswith("service.inference."):
        importlib.import_module(module.name)
print("imported")
"""


def locked(path: Path) -> dict[str, str]:
    pins = [line.split(";")[0].strip() for line in path.read_text().splitlines()]
    return dict(pin.split("==") for pin in pins if pin)


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower()


@pytest.mark.parametrize("image", ["control-plane", "ray-node"])
def test_images_contain_the_versions_that_the_tests_use(image: str) -> None:
    tested = locked(ROOT / "requirements.lock")
    untested = {pin for pin in locked(DOCKER / f"{image}.lock").items() if tested.get(pin[0]) != pin[1]}
    assert not untested


@pytest.mark.parametrize(
    "lock", ["requirements.lock", "deploy/docker/control-plane.lock", "deploy/docker/ray-node.lock"]
)
def test_locks_pin_exact_versions_without_urls(lock: str) -> None:
    lines = (ROOT / lock).read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[^:/@]+", line)] == []


def test_only_the_ray_node_contains_torch() -> None:
    control_plane, ray_node = locked(DOCKER / "control-plane.lock"), locked(DOCKER / "ray-node.lock")
    assert not HEAVY & control_plane.keys()
    assert ray_node.keys() >= HEAVY
    assert ray_node["ray"] == control_plane["ray"]  # Ray clients and clusters must have the same version


def test_locks_are_up_to_date() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    group = project["dependency-groups"]["control-plane"]
    assert {name_of(r) for r in group} <= locked(DOCKER / "control-plane.lock").keys()
    assert {name_of(r) for r in project["project"]["dependencies"]} <= locked(DOCKER / "ray-node.lock").keys()
    # The group repeats some project requirements, and both must agree.
    ray = {"ray[default]>=2.59": "ray[default,serve,train,tune]>=2.59"}
    assert {ray.get(r, r) for r in group} <= set(project["project"]["dependencies"])


@pytest.mark.slow
def test_the_control_plane_image_contains_everything_it_imports() -> None:
    names = " ".join(locked(DOCKER / "control-plane.lock"))
    ran = subprocess.run(
        [sys.executable, "-c", CONTROL_PLANE_IMPORTS, names], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.stdout.endswith("imported\n"), ran.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    ran = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def _stages() -> dict[str, str]:
    """Return the stages of the Dockerfile by name."""
    stages = re.split(r"(?m)^FROM ", (DOCKER / "Dockerfile").read_text())[1:]
    return {stage.split()[2]: stage for stage in stages}


def test_the_base_image_is_pinned() -> None:
    named = _stages()
    outside = {stage.split()[0] for stage in named.values()} - named.keys()
    assert len(outside) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", outside.pop())


def test_both_images_run_as_the_same_user() -> None:
    named = _stages()
    for target in ("control-plane", "ray-node"):
        assert re.findall(r"(?m)^USER (.+)$", named[target]) == ["1000:1000"]


def test_the_build_context_contains_only_listed_paths_and_no_secrets() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text())
    for source in " ".join(copied).split():
        assert source in allowed or ("deploy/docker/*.lock" in allowed and source.startswith("deploy/docker/"))
        assert (ROOT / source).exists(), source
    assert {"**/.env", "**/secrets"} <= set(rules)
