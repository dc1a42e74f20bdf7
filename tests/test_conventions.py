"""Tests for project conventions: names, unique classes, module and folder sizes. Does not import the project."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SLOW_FILES

ROOT = Path(__file__).parents[1]
PACKAGES = ("amd", "tune_spaces", "service", "tests")
MODULES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "golden" not in path.parts
)  # fmt: skip

METAPHORS = frozenset(["room", "house", "floor", "door", "word", "edge", "shelf", "board"])
LITERAL = {"TensorBoard"}  # library names, and literal uses such as the edge of an image
LINES, FILES = 400, 15
COMMANDS = {"service/cli", "tests/service/cli"}  # folders with a module per command, and their tests

# Also defined by the reference implementation in tests/support.
SHARED_CLASSES = {"Attention", "Block", "Mlp"}


def parts(name: str) -> set[str]:
    """Return the lower-case parts of a snake_case or CamelCase name, each with and without a plural s."""
    tokens = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return {part for found in tokens for part in (found.lower(), found.lower().removesuffix("s"))}


def defined(tree: ast.AST) -> Iterator[str]:
    """Yield the names defined in a module: classes, functions, parameters, variables, attributes and import aliases."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.alias(asname=str(name)):
                yield name


@pytest.mark.parametrize("name", ["Room", "wait_for_room", "RayEdge", "words", "keyboard", "backwards", "BOARD_S"])
def test_a_metaphor_is_detected_only_if_it_is_a_whole_part_of_a_name(name: str) -> None:
    assert bool(parts(name) & METAPHORS) == (name not in {"keyboard", "backwards"})


@pytest.mark.parametrize("package", PACKAGES)
def test_names_contain_no_metaphors(package: str) -> None:
    found = defaultdict(set)
    for path in MODULES:
        if path.relative_to(ROOT).parts[0] == package:
            names = {*defined(ast.parse(path.read_text())), *path.relative_to(ROOT).with_suffix("").parts} - LITERAL
            for name in names:
                if parts(name) & METAPHORS:
                    found[str(path.relative_to(ROOT))].add(name)
    assert not found


def test_class_names_are_unique() -> None:
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1 and name not in SHARED_CLASSES}


def test_files_excluded_from_the_fast_tests_exist() -> None:
    assert [str(file) for file in SLOW_FILES if not file.is_file()] == []


def test_modules_have_at_most_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}


def test_folders_have_at_most_15_modules() -> None:
    counts: dict[str, int] = defaultdict(int)
    for path in MODULES:
        counts[str(path.parent.relative_to(ROOT))] += 1
    assert not {name: count for name, count in counts.items() if count > FILES and name not in COMMANDS}
