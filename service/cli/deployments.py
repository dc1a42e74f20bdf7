"""`amd encoders` subcommands that deploy encoders on the service."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from amd.config import ConfigError
from service.cli.connection import connected, default_project
from service.cli.encoder_source import find_encoder
from service.cli.exit_codes import FAILURE
from service.cli.listing import Listing, Output, Watch, print_service_list
from service.cli.options import AsJson
from service.cli.registry import IdOrAlias, Project
from service.cli.tables import Column

if TYPE_CHECKING:
    from service.serving.schemas import DeploymentView

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
        raise ConfigError([f"--{found['loc'][0]}: {found['msg']}"]) from None
    with connected(as_json, persistent=True) as client:
        chosen = {"encoder": find_encoder(client, encoder, request.project)}
        if candidate is not None:
            chosen["candidate"] = find_encoder(client, candidate, request.project)
        deployment = name or chosen["encoder"]
        client.deployments.put(deployment, request.model_copy(update=chosen))
        deployed = client.deployments.wait(deployment)
    print(deployed.model_dump_json() if as_json else f"{deployed.name}: {deployed.state} {deployed.message}".rstrip())
    if deployed.state != "healthy":
        raise typer.Exit(FAILURE)


def deployments(
    project: Project = None, output: Output = "table", watch: Watch = False, as_json: AsJson = False
) -> None:
    """List deployments with their state."""
    selected = default_project(project)
    print_service_list(DEPLOYMENTS, lambda client: client.deployments.list(selected), output, watch, as_json)


def undeploy(name: Annotated[str, typer.Argument(help="Deployment name.")], as_json: AsJson = False) -> None:
    """Delete a deployment; requests in progress are completed, and the encoder is kept."""
    with connected(as_json) as client:
        client.deployments.delete(name)
    print(json.dumps({"deleted": name}) if as_json else f"{name}: deployment deleted")
