"""`amd deployments`, and the `amd encoders` subcommands that deploy encoders on the service."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from amd.config import ConfigError, broken_rule
from service.cli.connection import configured_target, connected, default_project, local_stack, service_target
from service.cli.console import print_progress
from service.cli.encoder_source import find_encoder
from service.cli.exit_codes import FAILURE
from service.cli.ids import UNKNOWN_ID_STATUSES, with_similar_name
from service.cli.listing import Listing, Output, Watch, print_service_list
from service.cli.options import AsJson
from service.cli.registry import IdOrAlias, Project
from service.cli.tables import Column

if TYPE_CHECKING:
    from service.client import Client
    from service.serving.schemas import DeploymentView, RevisionView

app = typer.Typer(help="List, roll back and delete deployments.", no_args_is_help=True)

DeploymentName = Annotated[str, typer.Argument(help="Deployment name.")]

DEPLOYMENTS: Listing[DeploymentView] = Listing(
    columns=(
        Column("deployment", lambda item: item.name),
        Column("encoder", lambda item: item.encoder),
        Column("candidate", lambda item: f"{item.candidate} ({item.share:.0%})" if item.candidate else "", drop=3),
        Column("serving", lambda item: ", ".join(item.serving.values()), drop=2),
        Column("state", lambda item: item.state, wraps=False),
        Column("message", lambda item: item.message, drop=4),
    ),
    empty="no deployments",
)


def _with_id(name: str, encoder_id: str | None) -> str:
    """Return the encoder as requested, followed by its ID if it was requested by an alias."""
    return name if encoder_id in (None, name) else f"{name} ({encoder_id})"


def _candidate(revision: RevisionView) -> str:
    if revision.candidate is None:
        return ""
    return f"{_with_id(revision.candidate, revision.resolved.get('candidate'))} {revision.share:.0%}"


REVISIONS: Listing[RevisionView] = Listing(
    columns=(
        Column("revision", lambda item: str(item.number), wraps=False),
        Column("encoder", lambda item: _with_id(item.encoder, item.resolved.get("main"))),
        Column("candidate", _candidate, drop=2),
        Column("changed", lambda item: ", ".join(item.changed or ())),
        Column("restored", lambda item: str(item.restored or ""), drop=3),
        Column("by", lambda item: item.actor, drop=1),
        Column("created", lambda item: f"{item.created_at:%Y-%m-%d %H:%M:%S}", wraps=False, drop=4),
    ),
    empty="no revisions",
)


def deploy(
    encoder: IdOrAlias,
    name: Annotated[str | None, typer.Option(help="Deployment name; default: the encoder's name.")] = None,
    candidate: Annotated[str | None, typer.Option(help="Second encoder, which serves a share of the requests.")] = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of requests sent to the candidate.")] = 0.1,
    replicas: Annotated[
        str, typer.Option(help="Number of replicas, or min:max to autoscale; 0:2 scales to zero when idle.")
    ] = "1",
    cpus: Annotated[
        float, typer.Option(min=0.0, help="Number of CPUs reserved per replica; jobs cannot use them.")
    ] = 0.0,
    gpus: Annotated[
        float, typer.Option(min=0.0, help="Number of GPUs reserved per replica; use a fraction to share a GPU.")
    ] = 0.0,
    dtype: Annotated[str, typer.Option(help="Precision: float32 or bfloat16.")] = "float32",
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Deploy an encoder on Ray Serve, or update its deployment, and wait until it is healthy.

    A deployment of an alias follows the alias when it moves.
    """
    from pydantic import ValidationError

    from service.serving.schemas import DeploymentRequest

    low, _, high = replicas.partition(":")
    values = {"encoder": encoder, "candidate": candidate, "share": share, "cpus": cpus, "gpus": gpus, "dtype": dtype}
    try:
        request = DeploymentRequest.model_validate(
            {**values, "replicas": {"min": low, "max": high or low}, "project": default_project(project)}
        )
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError([f"--{found['loc'][0]}: {broken_rule(found)}"]) from None
    with connected(as_json, persistent=True) as client:
        chosen = {"encoder": find_encoder(client, encoder, request.project)}
        if candidate is not None:
            chosen["candidate"] = find_encoder(client, candidate, request.project)
        deployment = name or chosen["encoder"]
        client.deployments.put(deployment, request.model_copy(update=chosen))
        deployed = client.deployments.wait(deployment)
    _report_deployed(deployed, as_json)
    if not as_json:
        print_progress(f"embed a file with: {_embedding_command(deployed.name)}")


@app.command("list")
def deployments(
    project: Project = None, output: Output = "table", watch: Watch = False, as_json: AsJson = False
) -> None:
    """List deployments with their state."""
    selected = default_project(project)
    print_service_list(DEPLOYMENTS, lambda client: client.deployments.list(selected), output, watch, as_json)


def undeploy(name: DeploymentName, as_json: AsJson = False) -> None:
    """Delete a deployment; requests in progress are completed, and the encoder is kept."""
    with connected(as_json) as client:
        client.deployments.delete(_find_deployment(client, name).name)
    print(json.dumps({"deleted": name}) if as_json else f"{name}: deployment deleted")


app.command("delete")(undeploy)


@app.command()
def revisions(name: DeploymentName, output: Output = "table", watch: Watch = False, as_json: AsJson = False) -> None:
    """List the revisions of a deployment, newest first, with the settings that each one changed."""

    def fetch_revisions(client: Client) -> Sequence[RevisionView]:
        return client.deployments.revisions(_find_deployment(client, name).name)

    print_service_list(REVISIONS, fetch_revisions, output, watch, as_json)


@app.command()
def rollback(
    name: DeploymentName,
    to: Annotated[
        int | None, typer.Option(min=1, help="Number of the revision to restore; default: the one before the newest.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Restore the settings of an earlier revision as a new revision, and wait until the deployment is healthy.

    An alias is not moved: if the revision names an alias, the deployment serves the encoder that it points to now.
    """
    with connected(as_json, persistent=True) as client:
        deployment = _find_deployment(client, name)
        if to is None:
            _roll_back_last_change(client, deployment)
        else:
            client.deployments.rollback(name, to)
        deployed = client.deployments.wait(name)
    _report_deployed(deployed, as_json)


def _find_deployment(client: Client, name: str) -> DeploymentView:
    """Return the deployment. Raises the service's error if there is none, with the most similar name."""
    from service.client import ApiError

    try:
        return client.deployments.get(name)
    except ApiError as error:
        if error.problem.status not in UNKNOWN_ID_STATUSES:
            raise
        raise with_similar_name(error, name, [deployment.name for deployment in client.deployments.list()]) from None


def _roll_back_last_change(client: Client, deployment: DeploymentView) -> None:
    """Restore the revision before the newest one, unless the deployment has changed since it was fetched."""
    found = client.deployments.revisions(deployment.name)
    if len(found) < 2:
        raise ConfigError([f"{deployment.name}: there is no earlier revision to restore"])
    client.deployments.rollback(deployment.name, found[1].number, deployment.etag)


def _embedding_command(deployment: str) -> str:
    """Return a command that sends a file to a deployment of the selected service."""
    stack = local_stack() if configured_target() is None else None
    key = "$AMD_KEY" if stack is None else f"$(cat {shlex.quote(str(stack.key_file))})"
    url = f"{service_target().url.rstrip('/')}/v1/encoders/{deployment}/embeddings"
    return f'curl -H "Authorization: Bearer {key}" -F file=@FILE {url}'


def _report_deployed(deployed: DeploymentView, as_json: bool) -> None:
    """Print the deployment's state, and exit with an error unless it is healthy."""
    print(deployed.model_dump_json() if as_json else f"{deployed.name}: {deployed.state} {deployed.message}".rstrip())
    if deployed.state != "healthy":
        raise typer.Exit(FAILURE)
