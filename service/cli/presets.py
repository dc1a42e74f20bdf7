"""`amd presets`: list the presets, or print one preset's config. Does not import torch or Ray."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from amd.config import RunConfig
from amd.presets.load import PRESETS_BY_KIND, find_preset
from service.cli.console import out
from service.cli.listing import Output, chosen_format, print_document
from service.cli.options import AsJson


def presets(
    name: Annotated[str | None, typer.Argument(help="Preset to print as a complete config.")] = None,
    output: Output = "table",
    as_json: AsJson = False,
) -> None:
    """List the presets with their source, hardware and cost, or print one preset's config, by default as JSON."""
    chosen = chosen_format(output, as_json)
    if name is not None:
        config = find_preset(RunConfig, name).config
        if chosen == "yaml":
            print_document(config.model_dump(mode="json"), "yaml")
        else:
            print(config.model_dump_json(indent=2))
        return
    rows = [(kind, preset) for kind, group in PRESETS_BY_KIND.items() for preset in group.values()]
    if chosen != "table":
        facts = ("name", "summary", "source", "hardware")
        listed = (
            {"kind": kind, **{fact: getattr(p, fact) for fact in facts}, "gpu_hours_estimate": p.gpu_hours}
            for kind, p in rows
        )
        print_document(list(listed), chosen)
        return
    table = Table(
        caption="GPU-hours: estimated from FLOPs for an H100 at 40 % of peak bf16 throughput.", show_lines=True
    )
    table.add_column("name", no_wrap=True)
    table.add_column("command")
    table.add_column("summary and source")
    table.add_column("hardware and cost")
    for kind, p in rows:
        cost = f"{p.hardware}\nabout {p.gpu_hours:.0f} GPU-hours" if p.gpu_hours else p.hardware
        table.add_row(p.name, kind, f"{p.summary}\n[dim]{p.source}[/dim]", cost)
    out.print(table)
