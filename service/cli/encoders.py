"""`amd encoders`: list and show published encoders, import and export weights, and manage aliases and deployments.

Cards and weights are read from the location that `encoder_source` selects. Aliases, comparisons, downloads and
deployments require the service; their commands are defined in `registry` and `deployments`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args

import typer
from rich.markdown import Markdown
from rich.text import Text

from amd.artifacts.card import Card
from amd.artifacts.discovery import CARD, load_card, published_cards
from amd.config import ENCODER_SIZES, ConfigError, ImportConfig, Interpolation, Positions, validate
from amd.storage import resolve_root
from service.cli.connection import connected, default_project
from service.cli.console import err, out, print_plain, print_progress
from service.cli.deployments import deploy, deployments, undeploy
from service.cli.encoder_source import encoders_of_local_stack, published_encoder, uses_service
from service.cli.listing import Listing, Output, Watch, chosen_format, print_list, print_service_list
from service.cli.options import AsJson, Follow, Storage
from service.cli.registry import alias, aliases, compare, download
from service.cli.submission import absolute_path, exit_submitted
from service.cli.tables import Column

if TYPE_CHECKING:
    from service.client import Client
    from service.registry.schemas import EncoderView

app = typer.Typer(help="Manage published encoders, their aliases and deployments.", no_args_is_help=True)
EncoderName = Annotated[str, typer.Argument(metavar="ENCODER", help="Published encoder: ID, ID prefix, folder or URL.")]

NON_COMMERCIAL_MARK = "NC"
NO_SERVICE = "applies only to a service; select one with --context, and omit --storage"


def _licence(row: dict[str, Any]) -> Text:
    mark = Text(f"{NON_COMMERCIAL_MARK} " if row["non_commercial"] else "", style="bold red")
    return mark.append(row["weights_license"] or "not stated", style="not bold default")


def _best_score(row: dict[str, Any]) -> str:
    return "".join(f"{name.removeprefix('eval/')} {value:.2f}" for name, value in (row["best_score"] or {}).items())


ENCODERS: Listing[dict[str, Any]] = Listing(
    columns=(
        Column("id", lambda row: row["id"], wraps=False),
        Column("name", lambda row: row.get("name") or "", narrow=24, drop=5),
        Column("encoder", lambda row: row["size"], drop=3),
        Column("clip", lambda row: row["clip"], wraps=False, drop=2),
        Column("objective", lambda row: row["objective"] or "imported", drop=1),
        Column("best score", _best_score),
        Column("aliases", lambda row: "\n".join(row.get("aliases", ())), narrow=30, drop=4),
        Column("licence", _licence),
    ),
    empty="No encoders; publish one with `amd demo`, `amd train` or `amd encoders import`",
    record=dict,
    footnote=lambda rows: (
        f"{NON_COMMERCIAL_MARK}: non-commercial use only." if any(row["non_commercial"] for row in rows) else ""
    ),
)


@app.command("list")
def list_command(
    storage: Storage = None,
    project: Annotated[str | None, typer.Option(help="Project to list; requires a service.")] = None,
    output: Output = "table",
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """List encoders, newest first, from the service that a context or AMD_URL selects, or else from the storage root.

    NC marks encoders for non-commercial use only.
    """
    if uses_service(storage):
        selected = default_project(project)

        def fetch_views(client: Client) -> list[dict[str, Any]]:
            return [_view_facts(view) for view in client.encoders.list(project=selected)]

        print_service_list(ENCODERS, fetch_views, output, watch, as_json)
        return
    if project is not None:
        raise ConfigError([f"--project: {NO_SERVICE}"])
    root, chosen = resolve_root(storage), chosen_format(output, as_json)
    if chosen == "table":
        print_progress(f"storage root {root}")
    reported: set[str] = set()

    def fetch_cards() -> list[dict[str, Any]]:
        cards, problems = published_cards(root)
        for problem in problems:
            if problem not in reported:
                print_plain(f"skipped: {problem}", err)
        reported.update(problems)
        views = encoders_of_local_stack(storage)
        return [_card_facts(card) | (_names(views[card.id]) if card.id in views else {}) for card in cards]

    print_list(ENCODERS, fetch_cards, chosen, watch)


@app.command()
def show(encoder: EncoderName, storage: Storage = None, as_json: AsJson = False) -> None:
    """Show the card of an encoder: input format, origin, scores and licence."""
    from amd.artifacts.model_card import model_card

    with published_encoder(encoder, storage, CARD, as_json=as_json) as url:
        card = load_card(url)
    if as_json:
        print(card.model_dump_json())
        return
    page = model_card(card).split("---\n", 2)[2]  # without the front matter
    out.print(Markdown(page))


@app.command("import")
def import_command(
    weights: Annotated[str, typer.Argument(help="File, folder or URL in any supported layout, or timm:NAME.")],
    id: Annotated[str | None, typer.Option(help="ID to publish under; default: the file name.")] = None,
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
    project: Annotated[str | None, typer.Option(help="Project of the encoder; requires a service.")] = None,
    follow: Follow = None,
    as_json: AsJson = False,
) -> None:
    """Publish external weights as an encoder: official VideoMAE, MAE, MVD or AMD files, Hugging Face or timm models.

    If a context or AMD_URL selects a service, a job on that service publishes the weights; with --storage, they are
    published from this machine.
    """
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
    if uses_service(storage):
        _submit_import(values, default_project(project), follow, as_json)
    if project is not None or follow is not None:
        raise ConfigError([f"{'--follow' if project is None else '--project'}: {NO_SERVICE}"])
    config = validate(ImportConfig, values)
    from amd.exchange.importing import import_encoder

    imported = import_encoder(config)
    if as_json:
        print(json.dumps({**_card_facts(imported.card), "url": imported.url, "notes": imported.notes}))
        return
    row = _card_facts(imported.card)
    out.print(f"{row['id']}: {row['size']}, {row['clip']}; {imported.url}", markup=False, highlight=False)
    for note in imported.notes:
        out.print(f"  {note}", markup=False, highlight=False)
    if imported.card.weights_license is None:
        out.print("  licence unknown; set it with --license, so that students and exports inherit it", highlight=False)
    elif imported.card.is_non_commercial:
        out.print(
            f"  {NON_COMMERCIAL_MARK}: non-commercial use only ({imported.card.weights_license})", highlight=False
        )


def _submit_import(values: dict[str, Any], project: str | None, follow: bool | None, as_json: bool) -> NoReturn:
    """Start an import job on the selected service, and exit."""
    from service.client import ApiError, ImportRequest

    given = {**values, "weights": absolute_path(values["weights"]), "project": project}
    request = validate(ImportRequest, {name: value for name, value in given.items() if value is not None})
    with connected(as_json, persistent=True, announce=True) as client:
        try:
            job = client.encoders.import_(request)
        except ApiError as error:
            if error.problem.code == "uri_not_allowed":
                print_progress("to publish weights from this machine, set --storage to the storage root")
            raise
        exit_submitted(client, job, follow, as_json)


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
    with published_encoder(encoder, storage, as_json=as_json) as url:
        load_card(url)  # fails before torch is needed
        report = export(url, chosen, output)
    if as_json:
        print(report.model_dump_json())
    else:
        print_plain(str(report))


def _card_facts(card: Card) -> dict[str, Any]:
    encoder, clip, score = card.encoder, card.clip, card.best_score
    return {
        "id": card.id,
        "created": card.created.isoformat(),
        "size": _size(encoder.size, encoder.width, encoder.depth),
        "clip": _clip(None if clip.is_image else clip.frames, clip.size),
        "objective": card.objective,
        "classes": card.head.classes if card.head else None,
        "best_score": {score[0]: score[1]} if score else None,
        "weights_license": card.weights_license,
        "non_commercial": card.is_non_commercial,
    }


def _view_facts(view: EncoderView) -> dict[str, Any]:
    """Return the same facts as `_card_facts`, plus the name, project and aliases, which only a service knows."""
    clip = view.input
    return {
        "id": view.id,
        **_names(view),
        "created": view.created_at.isoformat(),
        "size": _size(view.size, view.width, view.depth),
        "clip": _clip(None if clip.kind == "image" else clip.frames, clip.size),
        "objective": None if view.objective == "imported" else view.objective,
        "classes": view.classes,
        "best_score": view.best_score,
        "weights_license": view.weights_license,
        "non_commercial": view.non_commercial,
        "project": view.project,
    }


def _names(view: EncoderView) -> dict[str, Any]:
    return {"name": view.name, "aliases": [alias.name for alias in view.aliases]}


def _size(name: str | None, width: int, depth: int) -> str:
    return f"{name or 'ViT'} {width}x{depth}"


def _clip(frames: int | None, size: tuple[int, int]) -> str:
    return f"{f'{frames}x' if frames else ''}{size[0]}x{size[1]}"


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


_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Registry of the service": (alias, aliases, compare, download),
    "Deployments of the service": (deploy, deployments, undeploy),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
