"""Tests for the package metadata. `make check-install` resolves the dependencies on all supported platforms."""

from __future__ import annotations

import importlib.util
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def check_install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_install", ROOT / ".ci" / "check_install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("sys_platform", "machine", "installed"),
    [("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "arm64", False)],
)
def test_decord_is_required_only_where_it_has_wheels(sys_platform: str, machine: str, installed: bool) -> None:
    requirements = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    (decord,) = [requirement for requirement in requirements if requirement.name == "decord"]
    assert decord.marker is not None
    assert decord.marker.evaluate({"sys_platform": sys_platform, "platform_machine": machine}) == installed


def test_classifiers_requirements_and_tools_agree_on_the_oldest_python_version(check_install: ModuleType) -> None:
    pythons = check_install.supported_pythons()
    assert pythons == ["3.11", "3.12", "3.13"]
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    assert all(python in allowed for python in pythons)
    assert "3.10" not in allowed
    assert PROJECT["tool"]["mypy"]["python_version"] == pythons[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + pythons[0].replace(".", "")


def test_check_install_fails_if_any_combination_does_not_resolve(
    check_install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolve(python: str, platform: str) -> subprocess.CompletedProcess[str]:
        failed = (python, platform) == ("3.12", check_install.PLATFORMS["Linux arm64"])
        return subprocess.CompletedProcess([], int(failed), "a==1\nb==2\n", "no wheels of a" if failed else "")

    monkeypatch.setattr(check_install, "resolve", resolve)
    assert check_install.main() == 1
    printed = capsys.readouterr().out
    assert "Python 3.12, Linux arm64: does not resolve\nno wheels of a\n" in printed
    assert "Python 3.13, macOS arm64: 2 packages\n" in printed
