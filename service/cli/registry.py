"""`amd encoders` subcommands that use the service's registry: aliases, comparison and download."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amd.config import ConfigError
from service.cli.connection import connected, default_project
from service.cli.console import out
from service.cli.encoder_source import find_encoder
from service.cli.listing import Listing, Output, Watch, chosen_format, print_document, print_service_list
from service.cli.options import AsJson
from service.cli.tables import Column, fitted_table
from service.web.formats import DASH, compact

if TYPE_CHECKING:
    from service.registry.schemas import AliasView, EncoderComparison, MoveView, ScoreValues

IdOrAlias = Annotated[
    str,
    typer.Argument(
        metavar="ENCODER", help="Encoder registered with the service: ID, ID prefix, alias, or name of its job."
    ),
]
OtherEncoders = Annotated[
    list[str],
    typer.Argument(metavar="ENCODER...", help="One to five encoders to compare with: ID, ID prefix or alias."),
]
Project = Annotated[str | None, typer.Option(help="Project; default: the project of the context or the API key.")]
ALIASES: Listing[AliasView] = Listing(
    columns=(
        Column("alias", lambda item: item.name),
        Column("encoder", lambda item: item.encoder, wraps=False),
        Column("project", lambda item: item.project, drop=2),
        Column("moved", lambda item: f"{item.changed_at:%Y-%m-%d %H:%M}", wraps=False, drop=3),
        Column("by", lambda item: item.changed_by, drop=1),
    ),
    empty="no aliases",
)

MOVES: Listing[MoveView] = Listing(
    columns=(
        Column("when", lambda move: f"{move.at:%Y-%m-%d %H:%M:%S}", wraps=False),
        Column("from", lambda move: move.before or ""),
        Column("to", lambda move: move.after or ""),
        Column("by", lambda move: move.actor, drop=1),
    ),
    empty="no changes",
)


def alias(
    name: Annotated[str, typer.Argument(help="Alias name, such as production: lower-case letters, digits, - and _.")],
    encoder: IdOrAlias,
    expected: Annotated[
        str | None, typer.Option(help="Move the alias only if it currently points to this encoder.")
    ] = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias to an encoder, atomically."""
    project = default_project(project)
    with connected(as_json) as client:
        condition = {} if expected is None else {"expected": find_encoder(client, expected, project)}
        moved = client.aliases.move(name, find_encoder(client, encoder, project), project=project, **condition)
    print(moved.model_dump_json() if as_json else f"{moved.name}: {moved.encoder}")


def aliases(
    name: Annotated[str | None, typer.Argument(help="Show this alias's history; default: list all aliases.")] = None,
    project: Project = None,
    output: Output = "table",
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """List aliases and the encoders they point to, or the history of one alias."""
    selected, chosen = default_project(project), chosen_format(output, as_json)
    if name is None:
        print_service_list(ALIASES, lambda client: client.aliases.list(selected), output, watch, as_json)
    elif chosen != "table":
        if watch:
            raise ConfigError([f"--watch: the history of an alias can be watched only as a table, not as {chosen}"])
        with connected(as_json) as client:
            print_document(client.aliases.get(name, selected).model_dump(mode="json"), chosen)
    else:
        print_service_list(MOVES, lambda client: client.aliases.get(name, selected).history, output, watch, as_json)


def compare(first: IdOrAlias, others: OtherEncoders, project: Project = None, as_json: AsJson = False) -> None:
    """Compare two to six encoders: size, scores by protocol, and differing training settings."""
    project = default_project(project)
    with connected(as_json) as client:
        names = [find_encoder(client, encoder, project) for encoder in (first, *others)]
        if as_json and len(names) == 2:  # scripts may rely on this form of the JSON
            print(client.encoders.compare(names[0], names[1], project).model_dump_json())
            return
        found = client.encoders.compare_several(names, project)
    if as_json:
        print(found.model_dump_json())
    else:
        _print_comparison(found)


def download(
    encoder: IdOrAlias,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: ENCODER.tar, or the name of --file.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(help="Single file to download, e.g. encoder.safetensors; default: all files, as a tar."),
    ] = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Download an encoder from the service. Resumes if the connection drops."""
    project = default_project(project)
    with connected(as_json, persistent=True) as client:
        found = find_encoder(client, encoder, project)
        target = output or Path(file or f"{found}.tar")
        client.encoders.download(found, target, file, project)
    facts = {"encoder": found, "file": str(target), "bytes": target.stat().st_size}
    print(json.dumps(facts) if as_json else f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


def _print_comparison(found: EncoderComparison) -> None:
    rows = [(figure.name, *(f"{value:,.0f}" for value in figure.values)) for figure in found.figures]
    for score in found.scores:
        views = f" {score.views}" if score.views else ""
        name = f"{score.protocol}{views} {score.metric.removeprefix('eval/')}, {score.data}"
        rows.append((name, *(_score(score, position) for position in range(len(found.encoders)))))
    for difference in found.differences:
        missing = "not stated" if difference.field == "weights_license" else DASH
        texts = [missing if value is None else compact(value) for value in difference.values]
        rows.append((difference.field, *texts))
    titles = ("", *(encoder.id for encoder in found.encoders))
    columns: list[Column[tuple[str, ...]]] = [
        Column(title, itemgetter(position)) for position, title in enumerate(titles)
    ]
    out.print(fitted_table(columns, rows, out.width))


def _score(score: ScoreValues, position: int) -> str:
    value = score.values[position]
    if value is None:
        return ""
    return f"{value:.2f} (best)" if position in score.best else f"{value:.2f}"
