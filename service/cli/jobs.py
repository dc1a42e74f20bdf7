"""`amd jobs …`: what a service runs is listed, shown, watched, stopped and gone on with.

How a job is found, and how it is told to people, stands below the commands; `--submit` tells its job alike.
"""

from __future__ import annotations

import itertools
import json
import sys
import typing
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amd.config import ConfigError
from amd.storage import local_path
from service.cli.connection import BAD_INPUT, DONE, FAILED, connected, stop

if TYPE_CHECKING:
    from service.client import Client
    from service.jobs.kinds import JobKind
    from service.jobs.schemas import JobDetail, JobView, State

LOOKED_THROUGH = 2000  # newest jobs, for a shortened id
COLOURS = {"succeeded": "green", "failed": "red", "running": "cyan", "cancelled": "yellow", "paused": "yellow"}

out = Console()
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
            labels=labels_of(label),
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
        print_pieces(client.jobs.logs(find_job(client, job).id, follow=follow, attempt=attempt, tail=tail))


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
        tell(client.jobs.cancel(find_job(client, job).id, deadline), as_json)


@app.command()
def pause(job: JobId, as_json: AsJson = False) -> None:
    """Stop a job with a last checkpoint, until `amd jobs resume`."""
    with connected(as_json) as client:
        tell(client.jobs.pause(find_job(client, job).id), as_json)


@app.command()
def resume(job: JobId, as_json: AsJson = False) -> None:
    """Go on with a paused job."""
    with connected(as_json) as client:
        tell(client.jobs.resume(find_job(client, job).id), as_json)


@app.command()
def retry(job: JobId, as_json: AsJson = False) -> None:
    """Start a failed or cancelled job once more, from its newest checkpoint."""
    with connected(as_json) as client:
        tell(client.jobs.retry(find_job(client, job).id), as_json)


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
            stop([str(error)], FAILED)
    tell(found, as_json)
    raise typer.Exit(exit_code(found))


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


# Finding


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
        stop([f"there is no job {text!r}; `amd jobs list` shows them"], BAD_INPUT)
    if len(found) > 1:
        more = ", …" if len(found) > 5 else ""
        stop([f"{text!r} begins {len(found)} jobs: {', '.join(found[:5])}{more}; give more of the id"], BAD_INPUT)
    return client.jobs.get(found[0])


def labels_of(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """What `--label` says; None where it says nothing."""
    for pair in pairs or ():
        if "=" not in pair:
            raise ConfigError([f"--label {pair}: write KEY=VALUE"])
    return dict(pair.split("=", 1) for pair in pairs) if pairs else None


# Showing


def print_pieces(pieces: Iterator[str], to: Any = None) -> None:
    """A log as it comes; `to`: a stream, by default stdout."""
    to = to or sys.stdout
    for piece in pieces:
        to.write(piece)
        to.flush()


def tell(job: JobView, as_json: bool) -> None:
    """Its id, its state and why on one line, or all of it as JSON."""
    if as_json:
        print(job.model_dump_json())
        return
    out.print(f"{job.id}: {_state(job)}{escape(_why(job))}", highlight=False, soft_wrap=True)


def _why(job: JobView) -> str:
    told = f" ({job.reason})" if job.reason else ""
    return f"{told}: {job.message}" if job.message else told


def exit_code(job: JobView) -> int:
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
