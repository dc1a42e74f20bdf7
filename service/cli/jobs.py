"""`amd jobs …`: list, inspect, follow, stop and resume jobs on the service.

The helpers that print a job and its log are also used by `--submit`.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from amd.config import ConfigError, parse_overrides
from amd.storage import join, local_path, write_bytes
from service.cli.connection import connected, default_project
from service.cli.console import fail, out
from service.cli.exit_codes import FAILURE, SUCCESS
from service.cli.job_arguments import JobId, Labels, build_request, find_job, parse_labels
from service.cli.job_views import details_table, progress_text, reason_text, state_text
from service.cli.listing import Listing, Output, Watch, print_service_list
from service.cli.options import AsJson
from service.cli.tables import Column, fitted_table
from service.cli.times import ago
from service.web.formats import plural

if TYPE_CHECKING:
    from service.client import Client
    from service.jobs.details.schemas import ArtifactView, PictureView
    from service.jobs.kinds import JobKind
    from service.jobs.schemas import JobView, State
    from service.serving.schemas import NeighbourView

COMPLETE_ID = re.compile(r"[a-z]+-[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")  # as `service.jobs.store.new_job_id` creates it

app = typer.Typer(help="List, follow, stop and resume jobs on the service.", no_args_is_help=True)

Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Config values to change, by dotted key.")
]
CopyName = Annotated[str | None, typer.Option("--name", help="Display name; default: the original job's.")]


@app.command("list")
def list_jobs(
    state: Annotated[
        str | None, typer.Option(help="State of the jobs to list: queued, running, succeeded, failed, …")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of the jobs to list: train, finetune, detect, probe, embed, search, …")
    ] = None,
    label: Labels = None,
    project: Annotated[
        str | None,
        typer.Option(
            help="Project to list; default: the project of the context, or else all projects that the key covers."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of jobs.")] = 20,
    output: Output = "table",
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    labels, selected = parse_labels(label), default_project(project)

    def fetch(client: Client) -> list[JobView]:
        found = client.jobs.list(
            kind=typing.cast("JobKind | None", kind),
            state=typing.cast("State | None", state),
            labels=labels,
            project=selected,
            page=min(limit, 200),
        )
        return list(itertools.islice(found, limit))

    print_service_list(JOBS, fetch, output, watch, as_json)


@app.command()
def show(job: JobId, as_json: AsJson = False) -> None:
    """Show a job: its state and the reason for it, progress, encoder and allowed actions."""
    with connected(as_json) as client:
        found = find_job(client, job)
    if as_json:
        print(found.model_dump_json())
    else:
        out.print(details_table(found))


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")] = False,
    tail: Annotated[
        int | None,
        typer.Option("--tail", "-n", min=0, help="Number of lines to print from the end of the log; default: all."),
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Attempt number; default: the newest.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Print this rank's output across all attempts; default: the job's log.")
    ] = None,
) -> None:
    """Print the log of a job or of one of its ranks."""
    with connected(persistent=follow) as client:
        print_log(client.jobs.logs(find_job(client, job).id, follow=follow, attempt=attempt, tail=tail, rank=rank))


@app.command()
def events(job: JobId, as_json: AsJson = False) -> None:
    """Print the history of a job, with the actor of each event, until the job ends.

    For a deleted job, whose history is kept, pass the complete ID.
    """
    with connected(as_json, persistent=True) as client:
        id = job if COMPLETE_ID.fullmatch(job) else find_job(client, job).id
        for event in client.jobs.events(id):
            if as_json:
                print(event.model_dump_json(), flush=True)
                continue
            data = ", ".join(f"{key}={value}" for key, value in event.data.items() if value not in (None, ""))
            out.print(f"{event.at:%Y-%m-%d %H:%M:%S}  {event.type}  by {event.actor}  {data}", markup=False)


@app.command()
def cancel(
    job: JobId,
    deadline: Annotated[
        float | None, typer.Option(min=0.001, help="Time limit in seconds for the final checkpoint.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a job after a final checkpoint."""
    with connected(as_json) as client:
        print_job(client.jobs.cancel(find_job(client, job).id, deadline), as_json)


@app.command()
def pause(job: JobId, as_json: AsJson = False) -> None:
    """Pause a job after a final checkpoint; `amd jobs resume` continues it."""
    with connected(as_json) as client:
        print_job(client.jobs.pause(find_job(client, job).id), as_json)


@app.command("stop-trial")
def stop_trial(
    job: JobId,
    trial: Annotated[int, typer.Argument(min=0, help="Trial number, as in the sweep's report.")],
    as_json: AsJson = False,
) -> None:
    """Stop a running trial of a sweep after a final checkpoint; the sweep continues with other trials."""
    with connected(as_json) as client:
        id = find_job(client, job).id
        found = client.jobs.stop_trial(id, trial)
    print(found.model_dump_json() if as_json else f"{id}: trial {found.number} is saving a final checkpoint")


@app.command()
def resume(job: JobId, as_json: AsJson = False) -> None:
    """Resume a paused job."""
    with connected(as_json) as client:
        print_job(client.jobs.resume(find_job(client, job).id), as_json)


@app.command()
def retry(job: JobId, as_json: AsJson = False) -> None:
    """Retry a failed or cancelled job from its newest checkpoint."""
    with connected(as_json) as client:
        print_job(client.jobs.retry(find_job(client, job).id), as_json)


@app.command()
def clone(
    job: JobId,
    overrides: Changes = None,
    name: CopyName = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            help="Label as KEY=VALUE; may be repeated; empty for no labels; default: the original job's labels.",
        ),
    ] = None,
    priority: Annotated[
        int | None, typer.Option(min=-100, max=100, help="Priority of the copy; default: the original job's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a copy of a job, with changes, that starts where the original job started."""
    from service.jobs.details.schemas import CloneRequest

    labels = {} if label == [""] else parse_labels(label)
    changes = {"name": name, "labels": labels, "priority": priority}
    request = build_request(CloneRequest, overrides=parse_overrides(overrides or []), **changes)
    with connected(as_json) as client:
        print_job(client.jobs.clone(find_job(client, job).id, request), as_json)


@app.command()
def fork(
    job: JobId,
    step: Annotated[int, typer.Argument(min=1, help="Step of one of the job's checkpoints.")],
    overrides: Changes = None,
    name: CopyName = None,
    as_json: AsJson = False,
) -> None:
    """Submit a copy of a pre-training job that starts from one of its checkpoints."""
    from service.jobs.details.schemas import ForkRequest

    request = build_request(ForkRequest, step=step, overrides=parse_overrides(overrides or []), name=name)
    with connected(as_json) as client:
        print_job(client.jobs.fork(find_job(client, job).id, request), as_json)


@app.command()
def delete(job: JobId, as_json: AsJson = False) -> None:
    """Delete a job that has ended, with its log and checkpoints; its published encoder is kept."""
    with connected(as_json) as client:
        found = find_job(client, job)
        client.jobs.delete(found.id)
    print(json.dumps({"id": found.id, "deleted": True}) if as_json else f"{found.id}: deleted")


@app.command()
def wait(
    job: JobId,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Maximum time to wait in seconds; default: no limit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job ends; the exit code is 0 only if the job succeeded."""
    with connected(as_json, persistent=True) as client:
        try:
            found = client.jobs.wait(find_job(client, job).id, timeout)
        except TimeoutError as error:
            fail(str(error))
    print_job(found, as_json)
    raise typer.Exit(exit_code(found))


@app.command()
def report(
    job: JobId,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: JOB.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a report on a run or a sweep as one HTML file: curves, config, scores, trials and how to reproduce it."""
    with connected(as_json) as client:
        id = find_job(client, job).id
        page = client.jobs.report(id).encode()
    target = output or Path(f"{id}.html")
    try:
        target.write_bytes(page)
    except OSError as error:
        raise ConfigError([f"--output {target}: cannot be written ({error.strerror}); choose another file"]) from None
    facts = {"job": id, "file": str(target), "bytes": len(page)}
    print(json.dumps(facts) if as_json else f"{target}: {len(page) / 1024:.0f} KiB")


@app.command()
def media(
    job: JobId,
    download: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder to download the pictures to, with a subfolder per step."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List or download the pictures of samples and their reconstructions that a job writes while it trains."""
    with connected(as_json) as client:
        id = find_job(client, job).id
        steps = client.jobs.media(id)
        pictures = [(found.step, file) for found in steps for file in found.files]
        for step, file in pictures if download is not None else ():
            content = client.jobs.picture(id, step, file.name)
            write_bytes(join(str(download), f"step-{step:08d}", file.name), content)
    if as_json:
        print(json.dumps([step.model_dump(mode="json") for step in steps]))
    elif download is not None:
        out.print(f"{len(pictures)} pictures from {len(steps)} steps in {download}", markup=False)
    else:
        out.print(fitted_table(MEDIA, pictures, out.width))


@app.command()
def artifacts(
    job: JobId,
    download: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder to download the files to, under their paths.")
    ] = None,
    only: Annotated[
        str, typer.Option(metavar="PREFIX", help="List or download only paths that start with this, e.g. output/.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List or download the files that a job has written: reports, metrics, test results and embeddings."""
    with connected(as_json) as client:
        id = find_job(client, job).id
        files = [file for file in client.jobs.artifacts(id).items if file.path.startswith(only)]
        for file in files if download is not None else ():
            target = local_path(join(str(download), file.path))
            target.parent.mkdir(parents=True, exist_ok=True)
            client.jobs.download(id, file.path, target)
    if as_json:
        print(json.dumps([file.model_dump(mode="json") for file in files]))
    elif download is not None:
        out.print(f"{plural(len(files), 'file')} downloaded to {download}", markup=False)
    else:
        out.print(fitted_table(ARTIFACTS, files, out.width))


@app.command()
def neighbours(
    job: JobId,
    record: Annotated[int | None, typer.Option(min=0, help="Index of the query record in the data set.")] = None,
    location: Annotated[
        str | None, typer.Option(help="Location of the query record, as printed in the results.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Image or video to query with; requires a deployment of the same encoder.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Number of neighbours.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Find the nearest neighbours of a record or a file in the embeddings of an embed job."""
    if sum(query is not None for query in (record, location, file)) != 1:
        raise ConfigError(["--record, --location, --file: pass exactly one"])
    if file is not None and "://" not in file and not local_path(file).is_file():
        raise ConfigError([f"--file {file}: no such file"])
    with connected(as_json) as client:
        id = find_job(client, job).id
        found = client.jobs.neighbours(id, record=record, location=location, file=file, k=k)
    if as_json:
        print(json.dumps([each.model_dump(mode="json") for each in found]))
        return
    out.print(fitted_table(NEIGHBOURS, found, out.width))


# Output


def print_log(pieces: Iterator[str], to: Any = None) -> None:
    """Print a log as it arrives. `to` is a stream, by default standard output."""
    to = to or sys.stdout
    for piece in pieces:
        to.write(piece)
        to.flush()


def print_job(job: JobView, as_json: bool) -> None:
    """Print a job's ID, state and reason on one line, or the whole job as JSON."""
    if as_json:
        print(job.model_dump_json())
        return
    out.print(Text.assemble(f"{job.id}: ", state_text(job), reason_text(job)), soft_wrap=True)


def exit_code(job: JobView) -> int:
    return SUCCESS if job.state == "succeeded" else FAILURE


JOBS: Listing[JobView] = Listing(
    columns=(
        Column("id", lambda job: job.id, wraps=False),
        Column("state", state_text, wraps=False),
        Column("name", lambda job: job.name or job.preset or ""),
        Column("progress", progress_text, drop=2),
        Column("created", lambda job: ago(job.created_at), wraps=False, drop=1),
    ),
    empty="no jobs",
)

MEDIA: tuple[Column[tuple[int, PictureView]], ...] = (
    Column("step", lambda found: str(found[0]), wraps=False),
    Column("picture", lambda found: found[1].name, wraps=False),
    Column("bytes", lambda found: str(found[1].bytes), wraps=False),
)

ARTIFACTS: tuple[Column[ArtifactView], ...] = (
    Column("path", lambda file: file.path),
    Column("bytes", lambda file: str(file.bytes), wraps=False),
    Column("modified", lambda file: ago(file.modified_at) if file.modified_at else "", wraps=False),
)

NEIGHBOURS: tuple[Column[NeighbourView], ...] = (
    Column("score", lambda found: f"{found.score:.4f}", wraps=False),
    Column("record", lambda found: str(found.record), wraps=False),
    Column("label", lambda found: "" if found.label is None else str(found.label)),
    Column("location", lambda found: found.location),
)
