"""`--submit`: hands a command's words to the service as a job, and follows it as `amd jobs` would.

Knows no command: `submittable` adds the options to any, and its `Submission` sends what the command made of its words.
"""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer
from pydantic import ValidationError

from amd.config import ConfigError
from amd.presets.pretraining import read_config_file
from amd.storage import is_remote, local_path
from amd.training.run_folder import DATA_FIELDS, WEIGHTS_FIELDS
from service.cli.connection import DONE, connected, err
from service.cli.jobs import Labels, exit_code, labels_of, print_pieces, tell

if TYPE_CHECKING:
    from service.jobs.kinds import JobKind
    from service.jobs.schemas import JobView


class Submission(NamedTuple):
    """What `--submit` and the options beside it ask for."""

    name: str | None
    labels: dict[str, str]
    priority: int
    project: str | None
    follow: bool | None

    def send(
        self, kind: JobKind, preset: str | None, config: str | None, overrides: Mapping[str, Any], *, as_json: bool
    ) -> NoReturn:
        """Submit the same words as a job; `config`: a file's name. Follows it where that is asked for, and ends."""
        values = _absolute(read_config_file(config)) if config else {} if kind in ("probe", "embed") else None
        told = {"name": self.name, "labels": self.labels, "priority": self.priority, "project": self.project}
        with connected(as_json, patient=True) as client:
            from service.client import JobRequest

            try:
                request = JobRequest(kind=kind, preset=preset, config=values, overrides=_placed(overrides), **told)
            except ValidationError as error:
                raise ConfigError(
                    [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
                ) from None
            job: JobView = client.jobs.submit(request)
            if not (self.follow if self.follow is not None else sys.stdout.isatty() and not as_json):
                print(job.model_dump_json() if as_json else job.id)
                raise typer.Exit(DONE)
            err.print(f"{job.id}: {job.state}; Ctrl-C ends this view of it and not the job", style="dim", markup=False)
            if not as_json:
                print(job.id, flush=True)
            print_pieces(client.jobs.logs(job.id, follow=True), sys.stderr if as_json else sys.stdout)
            job = client.jobs.get(job.id)
        tell(job, as_json)
        raise typer.Exit(exit_code(job))


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "submit": (Annotated[bool, typer.Option("--submit", help="Run it as a job of the service.")], False),
    "name": (Annotated[str | None, typer.Option("--name", help="Of the job, for people.")], None),
    "label": (Labels, None),
    "priority": (Annotated[int, typer.Option(min=-100, max=100, help="Of the job; higher starts earlier.")], 0),
    "project": (Annotated[str | None, typer.Option(help="Of the job; default: the key's.")], None),
    "follow": (
        Annotated[
            bool | None,
            typer.Option("--follow/--no-follow", help="Print the job's log until it ends; default: on a terminal."),
        ],
        None,
    ),
}


def submittable(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a submission in place of the command's parameter `job`: None where it runs here.

    A `name` of the command's own serves for both.
    """
    own = inspect.signature(command).parameters
    hints = typing.get_type_hints(command, include_extras=True)
    added = {name: option for name, option in _OPTIONS.items() if name not in own}

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        asked = {**given, **{name: given.pop(name) for name in added}}
        job = None
        if asked["submit"]:
            if given.get("local"):
                raise ConfigError(["--local and --submit: it runs here or as a job; give one of them"])
            labels = labels_of(asked["label"]) or {}
            job = Submission(asked["name"], labels, asked["priority"], asked["project"], asked["follow"])
        elif idle := [name for name, (_, default) in _OPTIONS.items() if name in added and asked[name] != default]:
            raise ConfigError([f"--{idle[0]}: is of a job; give --submit too"])
        command(**given, job=job)

    kept = [parameter.replace(annotation=hints[name]) for name, parameter in own.items() if name != "job"]
    new = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]
    with_options.__signature__ = inspect.Signature([*kept, *new])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *new)}
    return with_options


def _placed(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Local files by their whole path: the job runs in another folder."""
    return {key: _whole_path(value) if _is_file_field(key) else value for key, value in overrides.items()}


def _absolute(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _absolute(value, f"{prefix}{key}.")
        if isinstance(value, dict)
        else _whole_path(value)
        if _is_file_field(f"{prefix}{key}")
        else value
        for key, value in values.items()
    }


def _is_file_field(key: str) -> bool:
    return key.removeprefix("train.") in (*DATA_FIELDS, *WEIGHTS_FIELDS, "encoder")


def _whole_path(value: Any) -> Any:
    if isinstance(value, str) and value and not is_remote(value) and local_path(value).exists():
        return str(local_path(value))
    return value
