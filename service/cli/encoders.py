"""`amd encoders`: list published encoders, import and export weights, and manage aliases and deployments.

Cards and weights are read directly from the storage root; aliases, comparisons, downloads and deployments require the
service.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from amd.artifacts.card import Card
from amd.config import ENCODER_SIZES, ConfigError, ImportConfig, Interpolation, Positions, validate
from service.cli.connection import connected
from service.cli.console import err, out, print_plain
from service.cli.exit_codes import FAILURE
from service.cli.options import AsJson, Storage

if TYPE_CHECKING:
    from service.registry.schemas import AliasDetail, CompareView

app = typer.Typer(help="Manage published encoders, their aliases and deployments.", no_args_is_help=True)
EncoderName = Annotated[str, typer.Argument(metavar="ENCODER", help="Published encoder: id, folder or URL.")]

IdOrAlias = Annotated[
    str, typer.Argument(metavar="ENCODER", help="Id or alias of an encoder registered with the service.")
]
Project = Annotated[str | None, typer.Option(help="Project; default: the API key's project.")]

NON_COMMERCIAL_MARK = "NC"


@app.command("list")
def list_command(storage: Storage = None, as_json: AsJson = False) -> None:
    """List published encoders, newest first; NC marks encoders for non-commercial use only."""
    from amd.artifacts.discovery import published_cards
    from amd.storage import resolve_root

    root = resolve_root(storage)
    cards, problems = published_cards(root)
    for problem in problems:
        print_plain(f"skipped: {problem}", err)
    if as_json:
        print(json.dumps([_summary(card) for card in cards]))
        return
    if not cards:
        out.print(f"No encoders in {root}; publish one with `amd demo`, `amd train` or `amd encoders import`.")
        return
    table = Table(
        caption=f"{NON_COMMERCIAL_MARK}: non-commercial use only." if any(c.is_non_commercial for c in cards) else None
    )
    for column in ("id", "encoder", "clip", "objective", "best score", "licence"):
        table.add_column(column, no_wrap=column == "id", overflow="fold")
    for card in cards:
        row = _summary(card)
        score = card.best_score
        license = (f"[bold red]{NON_COMMERCIAL_MARK}[/bold red] " if card.is_non_commercial else "") + (
            card.weights_license or ""
        )
        shown = f"{score[0].removeprefix('eval/')} {score[1]:.2f}" if score else ""
        table.add_row(card.id, row["size"], row["clip"], row["objective"] or "imported", shown, license)
    out.print(table)


@app.command()
def show(encoder: EncoderName, storage: Storage = None, as_json: AsJson = False) -> None:
    """Show the card of an encoder: input format, origin, scores and licence."""
    from amd.artifacts.model_card import model_card

    card = _card(encoder, storage)[1]
    if as_json:
        print(card.model_dump_json())
        return
    page = model_card(card).split("---\n", 2)[2]  # without the front matter
    out.print(Markdown(page))


@app.command("import")
def import_command(
    weights: Annotated[str, typer.Argument(help="File, folder or URL in any supported layout, or timm:NAME.")],
    id: Annotated[str | None, typer.Option(help="Id to publish under; default: the file name.")] = None,
    size: Annotated[
        str | None, typer.Option(help=f"{', '.join(ENCODER_SIZES)}; default: inferred from the tensor shapes.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Number of attention heads; default: width / 64.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames per clip.")] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Image size in pixels: 224, or 224x320 (height x width).")
    ] = None,
    patch: Annotated[int | None, typer.Option(min=1, help="Pixels per token side.")] = None,
    tubelet: Annotated[int | None, typer.Option(min=1, help="Frames per token.")] = None,
    sampling_rate: Annotated[int | None, typer.Option(min=1, help="Frame stride within a clip.")] = None,
    positions: Annotated[
        str | None, typer.Option(help=f"Position embedding: {', '.join(get_args(Positions))}.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Pixel mean per channel, in [0, 1]: three comma-separated numbers.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Pixel standard deviation per channel: three comma-separated numbers.")
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help=f"Resize filter: {', '.join(get_args(Interpolation))}.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, e.g. CC-BY-NC-4.0.")] = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Publish external weights as an encoder: official VideoMAE, MAE, MVD, AMD files, Hugging Face folders, timm."""
    values = {
        "weights": weights,
        **({} if id is None else {"id": id}),
        "storage": storage,
        "size": _one_of("--size", size, tuple(ENCODER_SIZES)),
        "heads": heads,
        "frames": frames,
        "image_size": _pixels(image_size),
        "patch": patch,
        "tubelet": tubelet,
        "sampling_rate_frames": sampling_rate,
        "positions": _one_of("--positions", positions, get_args(Positions)),
        "mean": _colours("--mean", mean),
        "std": _colours("--std", std),
        "interpolation": _one_of("--interpolation", interpolation, get_args(Interpolation)),
        "license": license,
    }
    config = validate(ImportConfig, values)
    from amd.exchange.importing import import_encoder

    imported = import_encoder(config)
    if as_json:
        print(json.dumps({**_summary(imported.card), "url": imported.url, "notes": imported.notes}))
        return
    row = _summary(imported.card)
    out.print(f"{row['id']}: {row['size']}, {row['clip']}; {imported.url}", markup=False, highlight=False)
    for note in imported.notes:
        out.print(f"  {note}", markup=False, highlight=False)
    if imported.card.weights_license is None:
        out.print("  licence unknown; set it with --license, so that students and exports inherit it", highlight=False)
    elif imported.card.is_non_commercial:
        out.print(
            f"  {NON_COMMERCIAL_MARK}: non-commercial use only ({imported.card.weights_license})", highlight=False
        )


@app.command("export")
def export_command(
    encoder: EncoderName,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Output folder (timm, huggingface) or file (other formats).")
    ],
    format: Annotated[
        str, typer.Option("--format", "-f", help="Format: timm, huggingface, official, onnx or torch-export.")
    ] = "huggingface",
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Export an encoder to another format, and verify that the exported model produces the same output."""
    from amd.exchange.export import export
    from amd.exchange.formats import EXPORTERS

    formats = {str(name): name for name in EXPORTERS}
    chosen = formats[_one_of("--format", format, tuple(formats)) or "huggingface"]
    report = export(_card(encoder, storage)[0], chosen, output)
    if as_json:
        print(report.model_dump_json())
    else:
        print_plain(str(report))


# Through the service


@app.command()
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
    with connected(as_json) as client:
        condition = {} if expected is None else {"expected": expected}
        moved = client.aliases.move(name, encoder, project=project, **condition)
    print(moved.model_dump_json() if as_json else f"{moved.name}: {moved.encoder}")


@app.command()
def aliases(
    name: Annotated[str | None, typer.Argument(help="Alias to show with its history.")] = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """List aliases and the encoders they point to."""
    with connected(as_json) as client:
        if name is not None:
            _print_history(client.aliases.get(name, project), as_json)
            return
        found = client.aliases.list(project)
    if as_json:
        print(json.dumps([item.model_dump(mode="json") for item in found]))
        return
    table = _plain_table("alias", "encoder", "project", "moved", "by")
    for item in found:
        table.add_row(item.name, item.encoder, item.project, f"{item.changed_at:%Y-%m-%d %H:%M}", item.changed_by)
    out.print(table if found else "no aliases")


@app.command()
def compare(first: IdOrAlias, second: IdOrAlias, project: Project = None, as_json: AsJson = False) -> None:
    """Compare two encoders: size, scores by protocol, and differing training settings."""
    with connected(as_json) as client:
        found = client.encoders.compare(first, second, project)
    if as_json:
        print(found.model_dump_json())
    else:
        out.print(_comparison_table(found))


@app.command()
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
    """Download an encoder from the service; a broken connection is resumed."""
    target = output or Path(file or f"{encoder}.tar")
    with connected(as_json, persistent=True) as client:
        client.encoders.download(encoder, target, file, project)
    facts = {"encoder": encoder, "file": str(target), "bytes": target.stat().st_size}
    print(json.dumps(facts) if as_json else f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


@app.command()
def deploy(
    encoder: IdOrAlias,
    name: Annotated[str | None, typer.Option(help="Deployment name; default: the encoder's name.")] = None,
    candidate: Annotated[str | None, typer.Option(help="Second encoder, which serves a share of the requests.")] = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of requests sent to the candidate.")] = 0.1,
    replicas: Annotated[
        str, typer.Option(help="Number of replicas, or min:max to autoscale; 0:2 scales to zero when idle.")
    ] = "1",
    cpus: Annotated[float, typer.Option(min=0.0, help="CPUs reserved per replica, not available to jobs.")] = 0.0,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs reserved per replica; fractions share one GPU.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="Precision: float32 or bfloat16.")] = "float32",
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Deploy an encoder on Ray Serve, or update its deployment, and wait until it is healthy. Follows an alias."""
    from pydantic import ValidationError

    from service.serving.schemas import DeploymentRequest

    low, _, high = replicas.partition(":")
    values = {"encoder": encoder, "candidate": candidate, "share": share, "cpus": cpus, "gpus": gpus, "dtype": dtype}
    try:
        request = DeploymentRequest.model_validate(
            {**values, "replicas": {"min": low, "max": high or low}, "project": project}
        )
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError([f"--{found['loc'][0]}: {found['msg']}"]) from None
    with connected(as_json, persistent=True) as client:
        deployment = name or encoder
        client.deployments.put(deployment, request)
        deployed = client.deployments.wait(deployment)
    print(deployed.model_dump_json() if as_json else f"{deployed.name}: {deployed.state} {deployed.message}".rstrip())
    if deployed.state != "healthy":
        raise typer.Exit(FAILURE)


@app.command()
def deployments(project: Project = None, as_json: AsJson = False) -> None:
    """List deployments with their state."""
    with connected(as_json) as client:
        found = client.deployments.list(project)
    if as_json:
        print(json.dumps([item.model_dump(mode="json") for item in found]))
        return
    table = _plain_table("deployment", "encoder", "candidate", "serving", "state", "message")
    for item in found:
        share = f"{item.candidate} ({item.share:.0%})" if item.candidate else ""
        table.add_row(
            item.name, item.encoder, share, ", ".join(item.serving.values()), item.state, escape(item.message)
        )
    out.print(table if found else "no deployments")


@app.command()
def undeploy(name: Annotated[str, typer.Argument(help="Deployment name.")], as_json: AsJson = False) -> None:
    """Delete a deployment; requests in progress are completed, and the encoder is kept."""
    with connected(as_json) as client:
        client.deployments.delete(name)
    print(json.dumps({"deleted": name}) if as_json else f"{name}: deployment deleted")


def _print_history(found: AliasDetail, as_json: bool) -> None:
    if as_json:
        print(found.model_dump_json())
        return
    table = _plain_table("when", "from", "to", "by")
    for move in found.history:
        table.add_row(f"{move.at:%Y-%m-%d %H:%M:%S}", move.before or "", move.after or "", move.actor)
    out.print(table)


def _comparison_table(found: CompareView) -> Table:
    table = _plain_table("", found.a.id, found.b.id)
    for figure in found.figures:
        table.add_row(figure.name, f"{figure.a:,.0f}", f"{figure.b:,.0f}")
    for pair in found.scores:
        values = ("" if value is None else f"{value:.2f}" for value in (pair.a, pair.b))
        table.add_row(f"{pair.protocol} {pair.metric.removeprefix('eval/')}, {pair.data}", *values)
    for difference in found.differences:
        table.add_row(difference.field, *(escape(json.dumps(value)) for value in (difference.a, difference.b)))
    return table


def _plain_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _card(name: str, storage: str | None) -> tuple[str, Card]:
    from amd.artifacts.discovery import encoder_url, load_card
    from amd.storage import resolve_root

    url = encoder_url(resolve_root(storage), name)
    return url, load_card(url)


def _summary(card: Card) -> dict[str, Any]:
    encoder, clip = card.encoder, card.clip
    size = f"{encoder.size or 'ViT'} {encoder.width}x{encoder.depth}"
    frames = "" if clip.is_image else f"{clip.frames}x"
    score = card.best_score
    return {
        "id": card.id,
        "created": card.created.isoformat(),
        "size": size,
        "clip": f"{frames}{clip.size[0]}x{clip.size[1]}",
        "objective": card.objective,
        "classes": card.head.classes if card.head else None,
        "best_score": {score[0]: score[1]} if score else None,
        "weights_license": card.weights_license,
        "non_commercial": card.is_non_commercial,
    }


def _one_of(option: str, value: str | None, known: tuple[str, ...]) -> Any:
    if value is not None and value not in known:
        raise ConfigError([f"{option} {value}: must be one of {', '.join(known)}"])
    return value


def _pixels(value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError([f"--image-size {value}: must be a number of pixels, or height x width such as 224x320"])
    return int(parts[0]), int(parts[-1])


def _colours(option: str, value: str | None) -> tuple[float, float, float] | None:
    if value is None:
        return None
    try:
        red, green, blue = (float(part) for part in value.split(","))
    except ValueError:
        raise ConfigError([f"{option} {value}: must be three comma-separated numbers, such as 0.5,0.5,0.5"]) from None
    return red, green, blue
