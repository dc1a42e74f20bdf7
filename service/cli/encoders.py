"""`amd encoders`: what is published, and weights in and out.

Cards and weights are taken from the storage root itself; aliases, comparisons and downloads are the service's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from amd.artifacts.card import Card
from amd.config import ENCODER_SIZES, ConfigError, ImportConfig, Interpolation, Positions, validate
from service.cli.connection import connected

if TYPE_CHECKING:
    from service.registry.schemas import AliasDetail, CompareView

app = typer.Typer(help="Published encoders: list, show, import, export; aliases; deployments.", no_args_is_help=True)
out = Console()
err = Console(stderr=True)

Storage = Annotated[str | None, typer.Option(help="Root of the encoder ids; default: AMD_STORAGE.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
EncoderName = Annotated[str, typer.Argument(metavar="ENCODER", help="A published encoder: id, folder or URL.")]

Named = Annotated[str, typer.Argument(metavar="ENCODER", help="An encoder of the service: its id, or an alias.")]
Project = Annotated[str | None, typer.Option(help="Of the alias; default: the key's.")]

MARKER = "NC"  # stands beside what must not be used commercially


@app.command("list")
def list_command(storage: Storage = None, as_json: AsJson = False) -> None:
    """What is published, newest first; NC marks what must not be used commercially."""
    from amd.artifacts.discovery import published_cards
    from amd.storage import resolve_root

    root = resolve_root(storage)
    cards, problems = published_cards(root)
    for problem in problems:
        err.print(f"left out: {problem}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps([_row(card) for card in cards]))
        return
    if not cards:
        out.print(f"No encoders in {root}; `amd demo`, `amd train` or `amd encoders import` publish some.")
        return
    table = Table(caption=f"{MARKER}: non-commercial use only." if any(c.is_non_commercial for c in cards) else None)
    for column in ("id", "encoder", "clip", "objective", "best score", "licence"):
        table.add_column(column, no_wrap=column == "id", overflow="fold")
    for card in cards:
        row = _row(card)
        score = card.best_score
        license = (f"[bold red]{MARKER}[/bold red] " if card.is_non_commercial else "") + (card.weights_license or "")
        shown = f"{score[0].removeprefix('eval/')} {score[1]:.2f}" if score else ""
        table.add_row(card.id, row["size"], row["clip"], row["objective"] or "imported", shown, license)
    out.print(table)


@app.command()
def show(encoder: EncoderName, storage: Storage = None, as_json: AsJson = False) -> None:
    """The card of one encoder: how to feed it, where it came from, what it scored, under which licence."""
    from amd.artifacts.model_card import model_card

    card = _card(encoder, storage)[1]
    if as_json:
        print(card.model_dump_json())
        return
    page = model_card(card).split("---\n", 2)[2]  # without the front matter, which is for machines
    out.print(Markdown(page))


@app.command("import")
def import_command(
    weights: Annotated[str, typer.Argument(help="A file, folder or URL of any known layout, or timm:NAME.")],
    id: Annotated[str | None, typer.Option(help="Its name here; default: that of the file.")] = None,
    size: Annotated[str | None, typer.Option(help=f"{', '.join(ENCODER_SIZES)}; default: read off the shapes.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="No tensor tells; default: width / 64.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Pixels: 224, or 224x320 (height x width).")] = None,
    patch: Annotated[int | None, typer.Option(min=1, help="Side of a token in pixels.")] = None,
    tubelet: Annotated[int | None, typer.Option(min=1, help="Frames per token.")] = None,
    sampling_rate: Annotated[int | None, typer.Option(min=1, help="Every n-th frame goes into a clip.")] = None,
    positions: Annotated[str | None, typer.Option(help=f"{', '.join(get_args(Positions))}.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of pixels in [0, 1]: three numbers with commas.")] = None,
    std: Annotated[str | None, typer.Option(help="The same.")] = None,
    interpolation: Annotated[str | None, typer.Option(help=f"{', '.join(get_args(Interpolation))}.")] = None,
    license: Annotated[str | None, typer.Option(help="What the weights hand down, e.g. CC-BY-NC-4.0.")] = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Publish foreign weights as an encoder: official VideoMAE, MAE, MVD, AMD files, Hugging Face folders, timm."""
    words = {
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
    config = validate(ImportConfig, words)
    from amd.exchange.importing import import_encoder

    imported = import_encoder(config)
    if as_json:
        print(json.dumps({**_row(imported.card), "url": imported.url, "notes": imported.notes}))
        return
    row = _row(imported.card)
    out.print(f"{row['id']}: {row['size']}, {row['clip']}; {imported.url}", markup=False, highlight=False)
    for note in imported.notes:
        out.print(f"  {note}", markup=False, highlight=False)
    if imported.card.weights_license is None:
        out.print("  no licence is known; say it with --license, and students and exports carry it", highlight=False)
    elif imported.card.is_non_commercial:
        out.print(f"  {MARKER}: non-commercial use only ({imported.card.weights_license})", highlight=False)


@app.command("export")
def export_command(
    encoder: EncoderName,
    output: Annotated[str, typer.Option("--output", "-o", help="A folder (timm, huggingface), else a file.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="timm, huggingface, official, onnx or torch-export.")
    ] = "huggingface",
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Write an encoder in another format; what is read back must give the same output as ours."""
    from amd.exchange.export import export
    from amd.exchange.formats import EXPORTERS

    formats = {str(name): name for name in EXPORTERS}
    chosen = formats[_one_of("--format", format, tuple(formats)) or "huggingface"]
    report = export(_card(encoder, storage)[0], chosen, output)
    if as_json:
        print(report.model_dump_json())
    else:
        out.print(str(report), markup=False, highlight=False, soft_wrap=True)


# Through the service


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="Lower case letters, digits, - and _: production, candidate, …")],
    encoder: Named,
    expected: Annotated[str | None, typer.Option(help="Move it only from this encoder.")] = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias to an encoder, at once: whoever asks for the alias gets one or the other, whole."""
    with connected(as_json) as client:
        words = {} if expected is None else {"expected": expected}
        moved = client.aliases.move(name, encoder, project=project, **words)
    print(moved.model_dump_json() if as_json else f"{moved.name}: {moved.encoder}")


@app.command()
def aliases(
    name: Annotated[str | None, typer.Argument(help="Show this one, and where it has pointed.")] = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """List aliases and what they point to."""
    with connected(as_json) as client:
        if name is not None:
            _tell_history(client.aliases.get(name, project), as_json)
            return
        found = client.aliases.list(project)
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in found]))
        return
    table = _plain_table("alias", "encoder", "project", "moved", "by")
    for one in found:
        table.add_row(one.name, one.encoder, one.project, f"{one.changed_at:%Y-%m-%d %H:%M}", one.changed_by)
    out.print(table if found else "no aliases")


@app.command()
def compare(first: Named, second: Named, project: Project = None, as_json: AsJson = False) -> None:
    """Two encoders side by side: size, scores by protocol, and what differs in how they were made."""
    with connected(as_json) as client:
        found = client.encoders.compare(first, second, project)
    if as_json:
        print(found.model_dump_json())
    else:
        out.print(_side_by_side(found))


@app.command()
def download(
    encoder: Named,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: its own name, in this folder.")
    ] = None,
    file: Annotated[str | None, typer.Option(help="encoder.safetensors, …; default: all, as a tar.")] = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Fetch an encoder from the service; a broken connection is taken up where it broke."""
    target = output or Path(file or f"{encoder}.tar")
    with connected(as_json, patient=True) as client:
        client.encoders.download(encoder, target, file, project)
    facts = {"encoder": encoder, "file": str(target), "bytes": target.stat().st_size}
    print(json.dumps(facts) if as_json else f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


@app.command()
def deploy(
    encoder: Named,
    name: Annotated[str | None, typer.Option(help="Of the deployment; default: the encoder's.")] = None,
    candidate: Annotated[str | None, typer.Option(help="Another encoder that answers a share of the requests.")] = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the requests, for the candidate.")] = 0.1,
    replicas: Annotated[
        str, typer.Option(help="How many, or from:to as requests queue; 0:2 costs nothing idle.")
    ] = "1",
    cpus: Annotated[float, typer.Option(min=0.0, help="Of a replica, taken away from jobs.")] = 0.0,
    gpus: Annotated[float, typer.Option(min=0.0, help="Of a replica; fractions share one.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Have an encoder answer requests on Ray Serve, or change how; waits until it does. An alias is followed."""
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
    with connected(as_json, patient=True) as client:
        called = name or encoder
        client.deployments.put(called, request)
        made = client.deployments.wait(called)
    print(made.model_dump_json() if as_json else f"{made.name}: {made.state} {made.message}".rstrip())
    if made.state != "healthy":
        raise typer.Exit(1)


@app.command()
def deployments(project: Project = None, as_json: AsJson = False) -> None:
    """List what answers requests, and how it is."""
    with connected(as_json) as client:
        found = client.deployments.list(project)
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in found]))
        return
    table = _plain_table("deployment", "encoder", "candidate", "serving", "state", "message")
    for one in found:
        share = f"{one.candidate} ({one.share:.0%})" if one.candidate else ""
        table.add_row(one.name, one.encoder, share, ", ".join(one.serving.values()), one.state, escape(one.message))
    out.print(table if found else "no deployments")


@app.command()
def undeploy(name: Annotated[str, typer.Argument(help="A deployment.")], as_json: AsJson = False) -> None:
    """Take a deployment down; requests under way are answered, and the encoder stays."""
    with connected(as_json) as client:
        client.deployments.delete(name)
    print(json.dumps({"deleted": name}) if as_json else f"{name} is taken down")


def _tell_history(found: AliasDetail, as_json: bool) -> None:
    if as_json:
        print(found.model_dump_json())
        return
    table = _plain_table("when", "from", "to", "by")
    for move in found.history:
        table.add_row(f"{move.at:%Y-%m-%d %H:%M:%S}", move.before or "", move.after or "", move.actor)
    out.print(table)


def _side_by_side(found: CompareView) -> Table:
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


def _row(card: Card) -> dict[str, Any]:
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
        raise ConfigError([f"{option} {value}: is none of {', '.join(known)}"])
    return value


def _pixels(value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError([f"--image-size {value}: a number of pixels, or height x width such as 224x320"])
    return int(parts[0]), int(parts[-1])


def _colours(option: str, value: str | None) -> tuple[float, float, float] | None:
    if value is None:
        return None
    try:
        red, green, blue = (float(part) for part in value.split(","))
    except ValueError:
        raise ConfigError([f"{option} {value}: three numbers with commas, such as 0.5,0.5,0.5"]) from None
    return red, green, blue
