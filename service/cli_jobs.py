"""`amd jobs …`: what a service runs; and `--submit`, which hands a command's words to it as a job.

The service is the one of AMD_URL, or the one that `amd up` started here. Its client is imported when it is needed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amd.config import ConfigError
from amd.presets import read_config_file
from amd.storage import is_remote, local_path
from amd.training.run import DATA_FIELDS, WEIGHTS_FIELDS

if TYPE_CHECKING:
    from service.client import Client
    from service.errors import Problem
    from service.jobs.kinds import JobKind
    from service.jobs.schemas import JobDetail, JobView, State

DONE, FAILED, BAD_INPUT = 0, 1, 2
LOOKED_THROUGH = 2000  # newest jobs, for a shortened id
COLOURS = {"succeeded": "green", "failed": "red", "running": "cyan", "cancelled": "yellow", "paused": "yellow"}

out = Console()
err = Console(stderr=True)
app = typer.Typer(help="Jobs of the service: list, watch, stop, go on.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Its id, or the beginning of it or of its last part.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE; may be given again.")]


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed, …")] = None,
    kind: Annotated[str | None, typer.Option(help="train, finetune, detect, probe, embed, search, …")] = None,
    label: Labels = None,
    project: Annotated[str | None, typer.Option(help="Of one project only.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with connected(as_json) as client:
        found = client.jobs.list(
            kind=typing.cast("JobKind | None", kind),
            state=typing.cast("State | None", state),
            labels=_labels(label),
            project=project,
            page=min(limit, 200),
        )
        jobs = list(itertools.islice(found, limit))
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in jobs]))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("id", "state", "what", "progress", "created"):
        table.add_column(column, no_wrap=column == "id")
    for job in jobs:
        table.add_row(job.id, _state(job), escape(job.name or job.preset or ""), _progress(job), _ago(job.created_at))
    out.print(table if jobs else "no jobs")


@app.command()
def show(job: JobId, as_json: AsJson = False) -> None:
    """Show a job: its state, why, how far it is, and what it came to."""
    with connected(as_json) as client:
        found = find_job(client, job)
    if as_json:
        print(found.model_dump_json())
    else:
        out.print(_whole(found))


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, help="The last lines only.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of this attempt; default: the newest.")] = None,
) -> None:
    """Print what a job printed."""
    with connected(patient=follow) as client:
        _print_pieces(client.jobs.logs(find_job(client, job).id, follow=follow, attempt=attempt, tail=tail))


@app.command()
def events(job: JobId, as_json: AsJson = False) -> None:
    """Print what happened to a job and who did it, and what happens until it has ended."""
    with connected(as_json, patient=True) as client:
        for event in client.jobs.events(find_job(client, job).id):
            if as_json:
                print(event.model_dump_json(), flush=True)
                continue
            told = ", ".join(f"{key}={value}" for key, value in event.data.items() if value not in (None, ""))
            out.print(f"{event.at:%Y-%m-%d %H:%M:%S}  {event.type}  by {event.actor}  {told}", markup=False)


@app.command()
def cancel(
    job: JobId,
    deadline: Annotated[float | None, typer.Option(min=0.001, help="Seconds for its last checkpoint.")] = None,
    as_json: AsJson = False,
) -> None:
    """Stop a job for good, with a last checkpoint."""
    with connected(as_json) as client:
        _tell(client.jobs.cancel(find_job(client, job).id, deadline), as_json)


@app.command()
def pause(job: JobId, as_json: AsJson = False) -> None:
    """Stop a job with a last checkpoint, until `amd jobs resume`."""
    with connected(as_json) as client:
        _tell(client.jobs.pause(find_job(client, job).id), as_json)


@app.command()
def resume(job: JobId, as_json: AsJson = False) -> None:
    """Go on with a paused job."""
    with connected(as_json) as client:
        _tell(client.jobs.resume(find_job(client, job).id), as_json)


@app.command()
def retry(job: JobId, as_json: AsJson = False) -> None:
    """Start a failed or cancelled job once more, from its newest checkpoint."""
    with connected(as_json) as client:
        _tell(client.jobs.retry(find_job(client, job).id), as_json)


@app.command()
def delete(job: JobId, as_json: AsJson = False) -> None:
    """Forget a job that has ended, with its log and checkpoints; an encoder that it published stays."""
    with connected(as_json) as client:
        found = find_job(client, job)
        client.jobs.delete(found.id)
    print(json.dumps({"id": found.id, "deleted": True}) if as_json else f"{found.id}: deleted")


@app.command()
def wait(
    job: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds; default: as long as it takes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job has ended; exit code 0 where it succeeded."""
    with connected(as_json, patient=True) as client:
        try:
            found = client.jobs.wait(find_job(client, job).id, timeout)
        except TimeoutError as error:
            _stop([str(error)], FAILED)
    _tell(found, as_json)
    raise typer.Exit(_exit_code(found))


@app.command()
def neighbours(
    job: JobId,
    record: Annotated[int | None, typer.Option(min=0, help="Its number in the data set.")] = None,
    location: Annotated[str | None, typer.Option(help="Its file, as the answers spell it.")] = None,
    file: Annotated[
        str | None, typer.Option(help="Any image or video; a deployment of the same encoder embeds it.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="How many.")] = 10,
    as_json: AsJson = False,
) -> None:
    """What lies nearest among the embeddings of a job of kind embed: to a record, a location or a file."""
    if sum(asked is not None for asked in (record, location, file)) != 1:
        raise ConfigError(["--record, --location, --file: give one of them"])
    if file is not None and "://" not in file and not local_path(file).is_file():
        raise ConfigError([f"--file {file}: there is no such file"])
    with connected(as_json) as client:
        id = find_job(client, job).id
        found = client.jobs.neighbours(id, record=record, location=location, file=file, k=k)
    if as_json:
        print(json.dumps([each.model_dump(mode="json") for each in found]))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("score", "record", "label", "location"):
        table.add_column(column, overflow="fold")
    for each in found:
        label = "" if each.label is None else str(each.label)
        table.add_row(f"{each.score:.4f}", str(each.record), label, escape(each.location))
    out.print(table)


# --submit


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
            _print_pieces(client.jobs.logs(job.id, follow=True), sys.stderr if as_json else sys.stdout)
            job = client.jobs.get(job.id)
        _tell(job, as_json)
        raise typer.Exit(_exit_code(job))


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
            labels = _labels(asked["label"]) or {}
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


# Talking to it


@contextmanager
def connected(as_json: bool = False, *, patient: bool = False) -> Iterator[Client]:
    """A client of the service. What goes wrong ends in its message: exit code 2 where the request was wrong, else 1.

    `patient`: a service that is away is waited for, as it is when it restarts.
    """
    from service.client import ApiError, Client, NoAnswer, Patience

    try:
        with Client.from_environment(patience=Patience(tries=16 if patient else 4)) as client:
            yield client
    except ApiError as error:
        _refused(error.problem, as_json)
    except NoAnswer as error:
        _stop([str(error)], FAILED)
    except KeyboardInterrupt:
        _stop(["no longer watched; the job goes on"], FAILED)


def find_job(client: Client, text: str) -> JobDetail:
    """The job of that id, or the one among the newest whose id, or its last part, begins so."""
    from service.client import ApiError

    try:
        return client.jobs.get(text)
    except ApiError as error:
        if error.problem.status not in (404, 422):
            raise
    newest = itertools.islice(client.jobs.list(), LOOKED_THROUGH)
    found = [job.id for job in newest if job.id.startswith(text) or job.id.rsplit("-", 1)[-1].startswith(text)]
    if not found:
        _stop([f"there is no job {text!r}; `amd jobs list` shows them"], BAD_INPUT)
    if len(found) > 1:
        more = ", …" if len(found) > 5 else ""
        _stop([f"{text!r} begins {len(found)} jobs: {', '.join(found[:5])}{more}; give more of the id"], BAD_INPUT)
    return client.jobs.get(found[0])


def _refused(problem: Problem, as_json: bool) -> NoReturn:
    lines = [found.detail for found in problem.errors] or [problem.detail]
    if as_json:
        print(json.dumps({"state": "refused", "code": problem.code, "problems": lines, "request": problem.request_id}))
    asked_wrong = 400 <= problem.status < 500 and problem.status not in (401, 403, 429)
    _stop(lines, BAD_INPUT if asked_wrong else FAILED)


def _stop(problems: Sequence[str], code: int) -> NoReturn:
    for problem in problems:
        err.print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _labels(pairs: Sequence[str] | None) -> dict[str, str] | None:
    for pair in pairs or ():
        if "=" not in pair:
            raise ConfigError([f"--label {pair}: write KEY=VALUE"])
    return dict(pair.split("=", 1) for pair in pairs) if pairs else None


# Showing


def _print_pieces(pieces: Iterator[str], to: Any = None) -> None:
    to = to or sys.stdout
    for piece in pieces:
        to.write(piece)
        to.flush()


def _tell(job: JobView, as_json: bool) -> None:
    if as_json:
        print(job.model_dump_json())
        return
    out.print(f"{job.id}: {_state(job)}{escape(_why(job))}", highlight=False, soft_wrap=True)


def _why(job: JobView) -> str:
    told = f" ({job.reason})" if job.reason else ""
    return f"{told}: {job.message}" if job.message else told


def _exit_code(job: JobView) -> int:
    return DONE if job.state == "succeeded" else FAILED


def _state(job: JobView) -> str:
    colour = COLOURS.get(job.state)
    return f"[{colour}]{job.state}[/{colour}]" if colour else job.state


def _progress(job: JobView) -> str:
    seen = job.progress
    if seen is None:
        return ""
    if seen.of_trials:
        return f"{seen.trials or 0}/{seen.of_trials} trials"
    if not seen.steps:
        return ""
    left = f", {_lasting(seen.seconds_left)} left" if seen.seconds_left and job.state == "running" else ""
    return f"{seen.step or 0}/{seen.steps}{left}"


def _ago(at: datetime) -> str:
    return f"{_lasting((datetime.now(UTC) - at).total_seconds())} ago"


def _lasting(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _whole(job: JobDetail) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    rows: list[tuple[str, str]] = [
        ("id", job.id),
        ("state", _state(job) + escape(_why(job))),
        ("kind", job.kind + (f", preset {job.preset}" if job.preset else "")),
        ("name", escape(job.name or "")),
        ("labels", escape(", ".join(f"{key}={value}" for key, value in job.labels.items()))),
        ("project", job.project),
        ("progress", _progress(job)),
        ("attempt", f"{job.attempt} (retries itself up to {job.max_retries} times)" if job.attempt else ""),
        ("created", f"{_ago(job.created_at)} by {job.created_by}"),
        ("run", job.run_folder),
        ("encoder", job.encoder or ""),
        ("may", ", ".join(job.allowed_actions)),
    ]
    for name, value in rows:
        if value:
            table.add_row(f"[dim]{name}[/dim]", value)
    if job.failure is not None and job.failure.log_tail:
        table.add_row("[dim]log ends[/dim]", escape(job.failure.log_tail))
    return table
