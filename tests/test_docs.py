"""Tests for the documentation: references are current, links resolve, and snippets use only existing names.

Checks README.md, CONTRIBUTING.md, deploy/README.md and docs/. Does not run the snippets.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from amd.config import TrainConfig, parse_overrides
from amd.presets.detection import DETECTION_PRESETS
from amd.presets.finetuning import FINETUNE_PRESETS
from amd.presets.pretraining import PRESETS
from service.cli.main import app
from service.jobs.kinds import KINDS, resolve
from service.jobs.schemas import Reason
from service.projects.schemas import ProjectPolicy
from tune_spaces.config import SearchConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
OTHERS = ("README.md", "CONTRIBUTING.md", "deploy/README.md", "tests/README.md")
PAGES = sorted([*(path for name in OTHERS for path in ROOT.glob(name)), *DOCS.rglob("*.md")])
GUIDES = [page for page in PAGES if page.parent != REFERENCE]
PRESET_NAMES = {*PRESETS, *FINETUNE_PRESETS, *DETECTION_PRESETS}
README_LINES = 125  # a screen and a half

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
OVERRIDE = re.compile(r"([a-z_][\w.]*)=(.*)", re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[str]:
    yield from (body for language, body in FENCE.findall(page.read_text()) if language in languages)


def shell_lines(page: Path) -> Iterator[str]:
    """Yield the lines of shell snippets, with continuation lines joined."""
    for block in blocks(page, "bash"):
        yield from block.replace("\\\n", " ").splitlines()


def spans(page: Path) -> Iterator[str]:
    """Yield the code spans in the text."""
    yield from CODE_SPAN.findall(FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates for a page's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = LINK.sub(lambda link: link[0][1:].split("]")[0], heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{number}" if number else slug for slug, last in found.items() for number in range(last + 1)}


# Structure


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate the references in a separate process, because doing so changes the environment."""
    folder = tmp_path_factory.mktemp("reference")
    command = [sys.executable, str(DOCS / "generate.py"), str(folder)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr[-5000:]
    return folder


@pytest.mark.slow
def test_every_reference_page_is_committed(generated: Path) -> None:
    assert {path.name for path in generated.iterdir()} == {path.name for path in REFERENCE.iterdir()}


@pytest.mark.parametrize("name", sorted(path.name for path in REFERENCE.glob("*.md")))
def test_references_are_up_to_date(name: str, generated: Path) -> None:
    committed, current = (REFERENCE / name).read_text(), (generated / name).read_text()
    if committed != current:
        changes = list(difflib.unified_diff(committed.splitlines(), current.splitlines(), lineterm="", n=0))
        pytest.fail(f"docs/reference/{name} is stale; run `make docs-reference`\n" + "\n".join(changes[2:60]))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(CODE_SPAN.sub("", FENCE.sub("", page.read_text()))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_is_linked_from_the_readme_and_the_index() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"index.md"}
    readme = {
        target.removeprefix("docs/").partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text())
    }
    index = {target.partition("#")[0] for target in LINK.findall((DOCS / "index.md").read_text())}
    assert not pages - readme
    assert not pages - index


def test_the_readme_is_short_and_contains_the_test_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    assert "make test" in text


# Commands


class SnippetError(AssertionError):
    """Raised when a snippet uses something that does not exist."""


def amd_commands(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each `amd` command in a line; environment variables may precede the command."""
    try:
        arguments = shlex.split(line, comments=True)
    except ValueError:  # an unfinished quote: a JSON body over several lines
        return
    while arguments and re.fullmatch(r"[A-Z_]+=\S*", arguments[0]):
        arguments = arguments[1:]
    if arguments[:1] == ["amd"]:
        yield arguments[1:]


def check_command(arguments: Sequence[str]) -> None:
    """Check a command's name, options, preset and config keys. `…` and arguments in capitals are placeholders."""
    command: Any = typer.main.get_command(app)
    path, rest = ["amd"], list(arguments)
    while commands := getattr(command, "commands", None):
        if rest and rest[0] in commands:
            path.append(rest[0])
            command = commands[rest.pop(0)]
        elif "run" in commands:  # `amd search` is `amd search run`
            command = commands["run"]
        elif not rest or rest[0].startswith("-"):
            break
        else:
            raise SnippetError(f"{' '.join(path)} has no command {rest[0]!r}")
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    overrides, preset = [], None
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if argument.startswith("-") and name not in ("--help", "-h"):
            if name not in options:
                raise SnippetError(f"{' '.join(path)} has no option {name}")
            if not getattr(options[name], "is_flag", False) and not equals:
                value = rest.pop(0)
            if name in ("--preset", "-p"):
                preset = value
        elif OVERRIDE.fullmatch(argument) and argument != "key=value":
            overrides.append(argument)
    if preset is not None and not preset.isupper() and preset not in PRESET_NAMES:
        raise SnippetError(f"there is no preset {preset!r}")
    if "-" not in path[-1] and len(path) > 1:
        check_overrides(path[1], preset, overrides)


def check_overrides(command: str, preset: str | None, overrides: Sequence[str]) -> None:
    """Check that config keys exist. Unless the snippet is abridged, also check that preset and overrides are valid."""
    models: dict[str, list[type[BaseModel]]] = {"search": [SearchConfig, TrainConfig], "projects": [ProjectPolicy]}
    for argument in overrides:
        key = argument.partition("=")[0]
        kinds = models.get(command) or [KINDS[command].config if command in KINDS else TrainConfig]
        if key == "data" and command in ("validate", "embed", "bench", "prepare"):
            key = "data.train"
        if not any(has_key(model, key.split(".")) for model in kinds):
            raise SnippetError(f"amd {command}: there is no config key {key}")
    if command in ("train", "finetune", "detect") and preset in PRESET_NAMES and "…" not in " ".join(overrides):
        values = {key: value for key, value in parse_overrides(overrides).items() if key != "name"}
        if command == "train" and "data.train" not in values and not preset.startswith("demo-"):
            return  # shows a single key
        resolve(command, preset, None, values)  # type: ignore[arg-type]


def has_key(model: Any, parts: Sequence[str]) -> bool:
    """Whether a dotted key exists. Any key below a field that is not a section counts as existing."""
    if not parts:
        return True
    fields = getattr(model, "model_fields", None)
    if fields is None:
        return True
    if parts[0] not in fields:
        return False
    annotation = fields[parts[0]].annotation
    inner = [part for part in (annotation, *get_args(annotation)) if hasattr(part, "model_fields")]
    return has_key(inner[0] if inner else None, parts[1:])


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_in_snippets_exist(page: Path) -> None:
    for line in [*shell_lines(page), *(span for span in spans(page) if span.startswith("amd "))]:
        for arguments in amd_commands(line):
            try:
                check_command(arguments)
            except Exception as error:
                pytest.fail(f"{line.strip()}\n{error}")


@pytest.mark.parametrize(
    "command",
    [
        "trian",
        "train --no-such-option",
        "train --preset no-such-preset",
        "train --preset demo-image-amd mask.no_such_key=1",
        "train --preset demo-image-amd mask.teacher_ratio=2",
        "train --preset ssv2-vit-b data.train=/data",  # without a teacher
        "jobs no-such-command",
        "search --study asymmetry no.such.key=1",
    ],
)
def test_wrong_commands_in_snippets_are_detected(command: str) -> None:
    with pytest.raises(Exception, match=r"no command|no option|no preset|no config key|teacher"):
        check_command(command.split())


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_programs_and_make_targets_in_snippets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in [*shell_lines(page), *spans(page)]:
        for module in re.findall(r"\bpython3? -m ((?:amd|service|tune_spaces|tests)[\w.]*)", line):
            assert importlib.util.find_spec(module), line
        for script in re.findall(r"\bpython3? ((?:tests|docs)/\S+\.py)", line):
            assert (ROOT / script).exists(), line
        for found in re.findall(r"^make ([a-z -]+?)(?:\s+#.*)?$", line.strip()):
            assert set(found.split()) <= targets, line


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_python_snippets_import_only_existing_names(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("amd", "service", "tune_spaces"):
                module = importlib.import_module(str(node.module))
                assert not [name.name for name in node.names if not hasattr(module, name.name)]


# REST


def rest_operations() -> set[tuple[str, str]]:
    headings = re.findall(r"^### (GET|POST|PUT|DELETE) (/\S*)$", (REFERENCE / "rest.md").read_text(), re.MULTILINE)
    assert headings
    return {(method, re.sub(r"\{\w+\}", "[^/]+", path)) for method, path in headings}


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_requests_in_snippets_match_existing_routes(page: Path) -> None:
    requests = []
    for line in shell_lines(page):
        for address in re.findall(r"(?:\$URL|http://127\.0\.0\.1:8400)(/[\w/.-]+)", line) if "curl" in line else []:
            method = re.search(r"-X (\w+)", line)
            has_body = re.search(r" (-d|-F|--data-binary) ", line)
            path = f"/v1{address}" if "$URL" in line else address
            requests.append((method[1] if method else "POST" if has_body else "GET", path))
    mentioned = (re.match(r"(GET|POST|PUT|DELETE) (/\S+)", span) for span in spans(page))
    requests += [(found[1], found[2]) for found in mentioned if found]
    operations = rest_operations()
    unknown = [
        (method, path)
        for method, path in requests
        if not any(method == known and re.fullmatch(pattern, path) for known, pattern in operations)
    ]
    assert not unknown


def test_every_error_code_is_documented() -> None:
    recorded = (ROOT / "tests" / "golden" / "surface" / "errors.txt").read_text().splitlines()
    codes = {line.split()[0] for line in recorded if " after status " not in line}
    assert codes <= set(re.findall(r"^\| `(\w+)` \| \d+ \|", (REFERENCE / "rest.md").read_text(), re.MULTILINE))


def test_every_failure_reason_is_documented() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(get_args(Reason))


def test_the_layers_of_the_packages_are_those_of_the_import_contracts() -> None:
    (block,) = (one for one in blocks(DOCS / "architecture.md", "text") if one.startswith("amd "))
    documented: dict[str, list[set[str]]] = {}
    package = ""
    for line in block.splitlines():
        package = line[:13].strip() or package
        documented.setdefault(package, []).append(set(line[13:].split("  ")[0].split(" · ")))
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {one["containers"][0]: one["layers"] for one in contracts if "containers" in one}
    assert documented == {package: [set(layer.split(" | ")) for layer in layers[package]] for package in documented}
