"""`amd presets`: list the named recipes, or print one as a config. Does not import torch or Ray."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from amd.presets.detection import DETECTION_PRESETS
from amd.presets.finetuning import FINETUNE_PRESETS
from amd.presets.pretraining import PRESETS
from amd.presets.pretraining import preset as find_preset
from service.cli.console import out
from service.cli.options import AsJson


def presets(
    name: Annotated[str | None, typer.Argument(help="Preset to print as a complete config.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the named recipes with their source, hardware and cost, or print one as a config."""
    others: dict[str, dict[str, Any]] = {"finetune": {**FINETUNE_PRESETS}, "detect": {**DETECTION_PRESETS}}
    if name is not None:
        found = next((group[name] for group in others.values() if name in group), None)
        print((found or find_preset(name)).config.model_dump_json(indent=2))
        return
    rows: list[tuple[str, Any, float | None]] = [("train", p, p.gpu_hours) for p in PRESETS.values()]
    rows += [(kind, p, None) for kind, group in others.items() for p in group.values()]
    if as_json:
        facts = ("name", "summary", "source", "hardware")
        listed = (
            {"kind": kind, **{fact: getattr(p, fact) for fact in facts}, "gpu_hours_estimate": hours}
            for kind, p, hours in rows
        )
        print(json.dumps(list(listed)))
        return
    table = Table(caption="GPU-hours: estimated from FLOPs for an H100 at 40 % of its bf16 peak.", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("command")
    table.add_column("summary and source")
    table.add_column("hardware and cost")
    for kind, p, hours in rows:
        cost = f"{p.hardware}\nabout {hours:.0f} GPU-hours" if hours else p.hardware
        table.add_row(p.name, kind, f"{p.summary}\n[dim]{p.source}[/dim]", cost)
    out.print(table)
