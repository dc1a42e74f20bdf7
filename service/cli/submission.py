"""`--submit`: submit a command to the service as a job, and follow its log like `amd jobs logs -f`.

`submittable` adds the options to a command; `Submission` sends the config that the command resolved.
"""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

from amd.config import ConfigError, ConfigLocation
from amd.config.locations import replace_in_overrides, replace_locations
from amd.presets.load import read_config_file
from amd.storage import is_remote, local_path
from service.cli.connection import connected, default_project
from service.cli.console import print_progress
from service.cli.encoder_source import submitted_encoder
from service.cli.exit_codes import SUCCESS
from service.cli.job_arguments import Labels, build_request, parse_labels
from service.cli.jobs import exit_code, print_job, print_log
from service.cli.options import Follow

if TYPE_CHECKING:
    from service.client import Client
    from service.jobs.kinds import JobKind
    from service.jobs.schemas import JobView


class Submission(NamedTuple):
    """Values of the options that accompany `--submit`."""

    name: str | None
    labels: dict[str, str]
    priority: int
    project: str | None
    follow: bool | None

    def send(
        self, kind: JobKind, preset: str | None, config: str | None, overrides: Mapping[str, Any], *, as_json: bool
    ) -> NoReturn:
        """Submit the command as a job, follow it if requested, and exit. `config` is a file or URL."""
        values: dict[str, Any] | None = {} if kind in ("probe", "embed") else None
        if config:
            values = _absolute_config(kind, read_config_file(config))
        metadata = {"name": self.name, "labels": self.labels, "priority": self.priority}
        metadata["project"] = project = default_project(self.project)
        overrides = _with_absolute_paths(kind, overrides)
        with connected(as_json, persistent=True) as client:
            from service.client import JobRequest

            for given in (values or {}, overrides):
                if isinstance(encoder := given.get("encoder"), str):
                    given["encoder"] = submitted_encoder(client, encoder, project)
            job = {"kind": kind, "preset": preset, "config": values, "overrides": overrides}
            request = build_request(JobRequest, **job, **metadata)
            exit_submitted(client, client.jobs.submit(request), self.follow, as_json)


def exit_submitted(client: Client, job: JobView, follow: bool | None, as_json: bool) -> NoReturn:
    """Print the ID of a submitted job and exit. With `follow`, print its log and exit once the job ends.

    `follow`: whether to follow the log; None means only on a terminal.
    """
    if not (follow if follow is not None else sys.stdout.isatty() and not as_json):
        print(job.model_dump_json() if as_json else job.id, flush=True)
        if not as_json:
            print_progress(f"{job.state}; follow it with `amd jobs logs -f {job.id}`")
        raise typer.Exit(SUCCESS)
    print_progress(f"{job.id}: {job.state}; Ctrl-C stops following, but the job continues")
    if not as_json:
        print(job.id, flush=True)
    print_log(client.jobs.logs(job.id, follow=True), sys.stderr if as_json else sys.stdout)
    ended = client.jobs.get(job.id)
    print_job(ended, as_json)
    if ended.encoder is not None and not as_json:
        print_progress(f"deploy its encoder with `amd encoders deploy {ended.encoder} --name NAME`")
    raise typer.Exit(exit_code(ended))


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "submit": (Annotated[bool, typer.Option("--submit", help="Run as a job on the service.")], False),
    "name": (Annotated[str | None, typer.Option("--name", help="Display name of the job.")], None),
    "label": (Labels, None),
    "priority": (
        Annotated[
            int, typer.Option(min=-100, max=100, help="Priority of the job; jobs with a higher priority start first.")
        ],
        0,
    ),
    "project": (
        Annotated[
            str | None, typer.Option(help="Project of the job; default: the project of the context or the API key.")
        ],
        None,
    ),
    "follow": (Follow, None),
}


def submittable(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's `job` parameter with the submission options; without --submit, `job` is None.

    If the command already has a `name` option, that option also sets the job's name.
    """
    own = inspect.signature(command).parameters
    hints = typing.get_type_hints(command, include_extras=True)
    added = {name: option for name, option in _OPTIONS.items() if name not in own}

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        options = {**arguments, **{name: arguments.pop(name) for name in added}}
        job = None
        if options["submit"]:
            if arguments.get("local"):
                raise ConfigError(
                    ["--local and --submit: a command runs either here or as a job; pass only one of them"]
                )
            labels = parse_labels(options["label"]) or {}
            job = Submission(options["name"], labels, options["priority"], options["project"], options["follow"])
        elif unused := [name for name, (_, default) in _OPTIONS.items() if name in added and options[name] != default]:
            raise ConfigError([f"--{unused[0]}: applies only to jobs; add --submit"])
        command(**arguments, job=job)

    kept = [parameter.replace(annotation=hints[name]) for name, parameter in own.items() if name != "job"]
    new = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]
    with_options.__signature__ = inspect.Signature([*kept, *new])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *new)}
    return with_options


def _with_absolute_paths(kind: JobKind, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Make paths of local files absolute, because the job runs in another folder."""
    from service.jobs.kinds import KINDS
    from tune_spaces.load_config import full_key

    absolute = dict[str, Any]()
    for key, value in overrides.items():
        full = full_key(key) if kind == "search" else key
        absolute[key] = replace_in_overrides(KINDS[kind].config, {full: value}, _absolute_location)[full]
    return absolute


def _absolute_config(kind: JobKind, values: Mapping[str, Any]) -> dict[str, Any]:
    from service.jobs.kinds import KINDS

    return replace_locations(KINDS[kind].config, values, _absolute_location)


def _absolute_location(location: ConfigLocation) -> str:
    return location.value if location.role == "tracking" else absolute_path(location.value)


def absolute_path(value: str) -> str:
    """Make the path of an existing local file absolute; return other values unchanged."""
    if value and not is_remote(value) and local_path(value).exists():
        return str(local_path(value))
    return value
