"""Render reports as self-contained HTML. All values are escaped; no template marks a value as safe."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from service.jobs.schemas import JobDetail
from service.reports.run import RunContent
from service.reports.sections import MAX_DIFFERENCES, preset_differences, reproduction
from service.reports.sweep_content import SweepContent
from service.web import formats

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy of a report, also embedded in the file: nothing is loaded, and no scripts run."""


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formats.FILTERS
    environment.globals |= {"policy": POLICY, "now": formats.now}
    return environment


_ENVIRONMENT = _environment()


def render_report(job: JobDetail, content: RunContent | SweepContent) -> str:
    """Return the HTML of a report."""
    differences = preset_differences(job)
    context: dict[str, Any] = {
        "job": job,
        "content": content,
        "differences": (differences or [])[:MAX_DIFFERENCES],
        "differences_omitted": max(0, len(differences or []) - MAX_DIFFERENCES),
        "has_preset": differences is not None,
        "reproduction": reproduction(job),
        "version": version("amd-service"),
    }
    template = "sweep.html" if isinstance(content, SweepContent) else "run.html"
    return _ENVIRONMENT.get_template(template).render(context)
