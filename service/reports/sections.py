"""Parts shared by run reports and sweep reports: charts, config differences, and how to repeat the job."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from markupsafe import Markup

from service.jobs.details.changes import portable_config
from service.jobs.details.commands import preset_arguments
from service.jobs.details.config_diff import ConfigRow, base_config, config_rows
from service.jobs.schemas import JobDetail

CONFIG_COMMANDS = ("train", "finetune", "detect", "search", "probe", "embed")  # kinds whose command takes --config
MAX_DIFFERENCES = 200
MAX_OVERRIDES = 40  # beyond which a command would be unreadable
MAX_CONFIG_CHARACTERS = 100_000


class LegendEntry(NamedTuple):
    """One series in the legend of a chart."""

    colour: str
    """CSS class of its colour."""
    name: str
    value: str
    """Last value."""


class ReportChart(NamedTuple):
    """A chart with its title and legend."""

    title: str
    svg: Markup
    legend: list[LegendEntry]


class Reproduction(NamedTuple):
    """Commands that repeat a job, and the config they need."""

    commands: list[tuple[str, str]]
    """(description, command) pairs."""
    file: str
    """Name of the file that the last command reads."""
    content: str
    """Content of the file; empty if it is too long."""


def preset_differences(job: JobDetail) -> list[ConfigRow] | None:
    """Return the config values that differ from the job's preset, or None if the job has no preset."""
    base = base_config(job.kind, job.preset, job.config)
    return None if base is None else [row for row in config_rows(job.config, base) if row.changed]


def reproduction(job: JobDetail) -> Reproduction | None:
    """Return how to repeat a job, or None for a run that was started outside the service without a stored config."""
    config = portable_config(job.config)
    if not config:
        return None
    commands = []
    differences = preset_differences(job)
    if job.preset and differences is not None and job.kind != "search":  # a search has settings beyond its preset
        command = preset_command(job.kind, job.preset, differences)
        commands += [("From the preset", command)] if command else []
    if job.kind in CONFIG_COMMANDS:
        commands.append(("From the complete config", f"amd {job.kind} --config config.json --submit"))
        return Reproduction(commands, "config.json", _json(config))
    request = (
        'curl -X POST "$AMD_URL/v1/jobs" -H "Authorization: Bearer $AMD_KEY" \\\n'
        "     -H 'Content-Type: application/json' -d @job.json"
    )
    return Reproduction([("As a request", request)], "job.json", _json({"kind": job.kind, "config": config}))


def preset_command(kind: str, preset: str, differences: list[ConfigRow]) -> str:
    """Return the command that submits a preset with these differences; empty if there are too many."""
    if len(differences) > MAX_OVERRIDES:
        return ""
    return f"amd {kind} {preset_arguments(preset, {row.key: row.value for row in differences})} --submit"


def _json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text if len(text) <= MAX_CONFIG_CHARACTERS else ""
