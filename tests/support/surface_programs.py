"""List the `amd` command, the programs that run as `python -m …`, and the Python interface, one fact per line.

To list a program's options, the program is run in this process until it has built its argument parser.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import inspect
import io
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

import typer

from tests.support.surface_schema import compact

PROGRAMS: dict[str, tuple[str, ...]] = {
    "amd.bench": ("step", "data"),
    "amd.training": ("",),
    "amd.downstream": ("probe", "embed", "finetune", "detect", "probe-checkpoint"),
    "amd.tasks": ("import", "export", "prepare"),
    "tune_spaces": ("",),
    "service": ("",),
}
NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


def command_lines() -> Iterator[str]:
    """Yield every command of `amd` with its arguments and options."""
    from service.cli.main import main

    found: list[typer.Typer] = []
    original = typer.Typer.__call__
    typer.Typer.__call__ = lambda self, *args, **kwargs: found.append(self)  # type: ignore[method-assign]
    try:
        main()
    finally:
        typer.Typer.__call__ = original  # type: ignore[method-assign]
    yield from _walk(typer.main.get_command(found[0]), "amd")


def _walk(command: Any, path: str) -> Iterator[str]:
    yield path + (" (hidden)" if command.hidden else "")
    arguments = 0
    for parameter in command.params:
        facts = {
            "required": parameter.required,
            "multiple": parameter.multiple if parameter.param_type_name == "option" else parameter.nargs,
            "type": _type(parameter.type_descriptor.annotation),
            "range": [parameter.min, parameter.max],
            "default": parameter.default() if callable(parameter.default) else parameter.default,
            "flag": getattr(parameter, "is_flag", False),
            "envvar": parameter.envvar,
        }
        facts = {key: value for key, value in facts.items() if value not in (None, False, [None, None])}
        if parameter.param_type_name == "argument":
            arguments += 1
            name = f"argument {arguments}"
        else:
            name = " / ".join([*sorted(parameter.opts), *(f"off {part}" for part in parameter.secondary_opts)])
        yield f"{path} [{name}] {compact(facts)}" if facts else f"{path} [{name}]"
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, f"{path} {name}")


def _type(annotation: Any) -> str:
    """Return the name of a type, or its allowed values."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return compact([member.value for member in annotation])
    if values := get_args(annotation):
        return compact([value if get_origin(annotation) is Literal else _type(value) for value in values])
    return getattr(annotation, "__name__", str(annotation))


def program_lines() -> Iterator[str]:
    """Yield the options of each program that runs as `python -m …`."""
    for module, commands in PROGRAMS.items():
        for command in commands:
            parser = _parser_of(module, [command] if command else [])
            name = f"python -m {module} {command}".strip()
            yield name
            for action in parser._actions:
                if isinstance(action, argparse._HelpAction):
                    continue
                facts = {
                    "required": action.required and bool(action.option_strings),
                    "nargs": action.nargs,
                    "choices": list(action.choices) if action.choices else None,
                    "default": action.default,
                    "type": getattr(action.type, "__name__", None),
                }
                facts = {key: value for key, value in facts.items() if value not in (None, False)}
                args = " / ".join(action.option_strings) or action.dest
                yield f"{name} [{args}] {compact(facts)}" if facts else f"{name} [{args}]"


class _Parsed(BaseException):
    """Raised to stop a program once its parser has been built."""


def _parser_of(module: str, args: Sequence[str]) -> argparse.ArgumentParser:
    found: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.parse_known_args

    def keep(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        found.append(parser)
        raise _Parsed

    argparse.ArgumentParser.parse_known_args = keep  # type: ignore[method-assign,assignment]
    try:
        run_program(module, args)
    finally:
        argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]
    return found[0]


def run_program(module: str, args: Sequence[str]) -> object:
    """Return the exit code of `python -m module args`, or the exception that it raises."""
    saved = sys.argv
    sys.argv = [module, *args]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            return ended.code or 0
        except _Parsed:
            return None
        except Exception as error:  # Python would print a traceback
            return f"{type(error).__name__}: {error}"
        finally:
            sys.argv = saved
    return 0


def exit_code_lines(job_root: str, job_id: str) -> Iterator[str]:
    """Yield the exit codes of each program: 0 for success, 1 for failure, 2 for bad input.

    The job in the store has already finished, so its runner does nothing.
    """
    missing = "--config=/does/not/exist.json"
    for module, command in [(module, command) for module, commands in PROGRAMS.items() for command in commands]:
        if module != "service" and command != "probe-checkpoint":
            code = run_program(module, [*([command] if command else []), missing])
            yield f"python -m {module} {command} with a config that is missing: {code}".replace("  ", " ")
    for module in ("amd.bench", "amd.downstream", "amd.tasks"):
        yield f"python -m {module} with an unknown command: {run_program(module, ['nothing'])}"
    yield f"python -m service.jobs.runner JOB ATTEMPT ROOT of a job that succeeded: {_runner(job_id, job_root)}"
    saved = dict(os.environ)
    try:
        yield f"python -m service migrate: {run_program('service', ['migrate'])}"
        os.environ["AMD_DATABASE_URL"] = NOWHERE
        yield f"python -m service migrate without a database: {run_program('service', ['migrate'])}"
        os.environ["AMD_PORT"] = "none"
        yield f"python -m service with a bad setting: {run_program('service', [])}"
    finally:
        os.environ.clear()
        os.environ.update(saved)
    for args in (
        ["presets"],
        ["presets", "nothing"],
        ["--version"],
        ["train", "no.such.key=1", "--preset=ssv2-vit-b"],
    ):
        yield f"amd {' '.join(args)}: {run_program('service.cli', args)}"


def _runner(job_id: str, root: str) -> object:
    return run_program("service.jobs.runner", [job_id, "1", root])


def python_lines() -> Iterator[str]:
    """Yield the names, methods and parameters of the Python interface."""
    import service.client
    from amd.artifacts import encode, load_encoder
    from service.client import AsyncClient, Client, JobRequest

    yield from (f"service.client.{name}" for name in service.client.__all__)
    for function in (encode, load_encoder):
        yield f"amd.artifacts.{function.__name__}{_parameters(function)}"
    for kind in (Client, AsyncClient):
        yield f"{kind.__name__}{_parameters(kind)}"
        yield from _methods(kind("http://127.0.0.1:1", "key"), kind.__name__)
    yield from (f"JobRequest.{name}" for name in JobRequest.model_fields)
    from service.serve import app  # imported last, because it imports Ray

    yield f"service.serve.app{_parameters(app)}"


def _methods(instance: Any, path: str) -> Iterator[str]:
    for name in sorted(vars(instance) | dict.fromkeys(dir(type(instance)))):
        if name.startswith("_"):
            continue
        value = getattr(instance, name)
        if callable(value):
            yield f"{path}.{name}{_parameters(value)}"
        else:
            yield from _methods(value, f"{path}.{name}")


def _parameters(function: Any) -> str:
    """Return the names, kinds and defaults of a function's parameters.

    Omits annotations, whose types may be renamed, and the name after `**`, which is invisible to callers.
    """
    if hasattr(function, "__wrapped__"):  # the signature comes from a function without `self`
        function = inspect.unwrap(getattr(function, "__func__", function))
    signature = inspect.signature(function)
    named = [one for one in signature.parameters.values() if one.name != "self"]
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in named]
    bare = [one.replace(name="options") if one.kind is one.VAR_KEYWORD else one for one in bare]
    found = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<object object at \w+>", "<object>", found)
