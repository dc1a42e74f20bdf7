"""`amd projects …`, `amd usage` and `amd audit`: project policies, hours used, and changes made by users."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from pydantic import ValidationError

from amd.config import ConfigError, broken_rule
from service.cli.connection import connected
from service.cli.console import out
from service.cli.listing import Listing, Output, Watch, chosen_format, print_document, print_list, print_service_list
from service.cli.options import AsJson
from service.cli.tables import Column, facts_table

if TYPE_CHECKING:
    from service.projects.schemas import AuditView, ProjectView, UsageView

app = typer.Typer(
    help="Manage project quotas, shares, budgets and storage credentials; requires an admin key.", no_args_is_help=True
)

ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="Name of the project.")]
OfProject = Annotated[str | None, typer.Option("--project", help="Project to list; default: all visible ones.")]
TIMES: dict[str, Any] = {"formats": ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], "metavar": "TIME"}
Since = Annotated[
    datetime | None,
    typer.Option(**TIMES, help="Start of the period in UTC, such as 2026-01-31 or 2026-01-31T12:00:00."),
]
Until = Annotated[datetime | None, typer.Option(**TIMES, help="End of the period in UTC.")]


def _quota(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _budget(used: float, budget: float | None) -> str:
    return f"{used:.1f}" if budget is None else f"{used:.1f} of {budget:g}"


PROJECTS: Listing[ProjectView] = Listing(
    columns=(
        Column("project", lambda project: project.name, wraps=False),
        Column("share", lambda project: f"{project.share:g}", wraps=False),
        Column("jobs", lambda project: _quota(project.max_running_jobs), wraps=False, drop=4),
        Column("workers", lambda project: _quota(project.max_workers), wraps=False, drop=3),
        Column("GPUs", lambda project: _quota(project.max_gpus), wraps=False),
        Column("replicas", lambda project: _quota(project.max_replicas), wraps=False, drop=2),
        Column("GiB", lambda project: _budget(project.stored_gib, project.max_storage_gib), wraps=False, drop=5),
        Column("GPU-hours", lambda project: _budget(project.gpu_hours, project.gpu_hours_per_month), wraps=False),
        Column("CPU-hours", lambda project: _budget(project.cpu_hours, project.cpu_hours_per_month), drop=1),
    ),
    empty="no project has a policy",
    footnote=lambda projects: "hours of the current month (UTC)",
)

USAGE: Listing[UsageView] = Listing(
    columns=(
        Column("key", lambda row: row.key, wraps=False),
        Column("project", lambda row: row.project, drop=1),
        Column("jobs", lambda row: str(row.jobs), wraps=False, drop=2),
        Column("GPU-hours", lambda row: f"{row.gpu_hours:.1f}", wraps=False),
        Column("CPU-hours", lambda row: f"{row.cpu_hours:.1f}", wraps=False),
    ),
    empty="no usage in this period",
)

CHANGES: Listing[AuditView] = Listing(
    columns=(
        Column("time", lambda entry: f"{entry.at:%Y-%m-%d %H:%M:%S}", wraps=False, drop=3),
        Column("actor", lambda entry: entry.actor, drop=2),
        Column("action", lambda entry: entry.action, wraps=False),
        Column("target", lambda entry: entry.target, wraps=False),
        Column("outcome", lambda entry: entry.outcome),
        Column("project", lambda entry: entry.project or "", drop=1),
    ),
    empty="no changes",
)


@app.command("list")
def list_command(output: Output = "table", watch: Watch = False, as_json: AsJson = False) -> None:
    """List the projects that have a policy, with their usage in the current month."""
    print_service_list(PROJECTS, lambda client: client.projects.list(), output, watch, as_json)


@app.command()
def show(project: ProjectName, as_json: AsJson = False) -> None:
    """Show a project's policy and usage."""
    with connected(as_json) as client:
        _print_project(client.projects.get(project), as_json)


@app.command("set")
def set_command(
    project: ProjectName,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE…",
            help="Values to change, such as share=2, max_gpus=16, gpu_hours_per_month=null or "
            "credentials.NAME.secret=file:/path; others stay as they are.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Set the share, limits, budgets or storage credentials of a project; null removes a limit or a credential."""
    from service.client import ApiError, ProjectPolicy

    changes = [_parsed(text) for text in values]
    with connected(as_json) as client:
        try:
            found: ProjectView | None = client.projects.get(project)
        except ApiError as error:
            if error.problem.code != "not_found":
                raise
            found = None
        changed = found.model_dump(include=set(ProjectPolicy.model_fields)) if found is not None else {}
        for key, value in changes:
            _set_value(changed, key, value)
        try:
            policy = ProjectPolicy.model_validate(changed)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc']))}: {broken_rule(one)}" for one in error.errors()]
            raise ConfigError(problems) from None
        _print_project(client.projects.put(project, policy), as_json)


def usage(
    by: Annotated[
        Literal["project", "user", "job", "sweep"],
        typer.Option(help="What to group by; user: whoever submitted the jobs."),
    ] = "project",
    since: Since = None,
    until: Until = None,
    project: OfProject = None,
    output: Output = "table",
    as_json: AsJson = False,
) -> None:
    """Show the GPU- and CPU-hours that jobs used; default: in the current month (UTC)."""
    chosen = chosen_format(output, as_json)
    with connected(chosen == "json", announce=chosen == "table") as client:
        found = client.projects.usage(by, since=_utc(since), until=_utc(until), project=project, limit=200)
    if chosen != "table":
        print_document(found.model_dump(mode="json"), chosen)
        return
    print_list(USAGE, lambda: found.items, "table", watch=False)
    out.print(f"total: {found.gpu_hours:.1f} GPU-hours, {found.cpu_hours:.1f} CPU-hours", style="dim")


def audit(
    target: Annotated[str | None, typer.Option(help="ID or name of the changed object; default: all.")] = None,
    action: Annotated[
        str | None, typer.Option(help="Kind of object and verb, such as job.cancel, or only the kind; default: all.")
    ] = None,
    actor: Annotated[str | None, typer.Option(help="ID of the key that made the change; default: all.")] = None,
    since: Since = None,
    until: Until = None,
    project: OfProject = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of changes.")] = 50,
    output: Output = "table",
    as_json: AsJson = False,
) -> None:
    """List the changes that users made, newest first; requires an admin key."""
    options: dict[str, Any] = {"target": target, "action": action, "actor": actor, "project": project}
    options |= {"since": _utc(since), "until": _utc(until)}
    print_service_list(
        CHANGES, lambda client: list(islice(client.projects.changes(**options), limit)), output, False, as_json
    )


def _print_project(project: ProjectView, as_json: bool) -> None:
    if as_json:
        print(project.model_dump_json())
        return
    figures = {"gpu_hours", "cpu_hours", "stored_gib", "in_use"}
    limits = project.model_dump(exclude={"name", "created_at", "changed_at", "changed_by", "credentials", *figures})
    facts = [(name, _quota(value)) for name, value in limits.items()]
    for name, credential in (project.credentials or {}).items():
        facts.append((f"credentials.{name}", f"{credential.secret} for {', '.join(credential.prefixes)}"))
    held = ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in project.in_use)
    used = f"{project.gpu_hours:.1f} GPU-hours, {project.cpu_hours:.1f} CPU-hours"
    changed = f"{project.changed_at:%Y-%m-%d %H:%M} by {project.changed_by}"
    stored = f"{project.stored_gib:.1f} GiB"
    usage = [("in use now", held), ("this month", used), ("stored", stored)]
    out.print(facts_table([("project", project.name), *facts, *usage, ("changed", changed)]))


def _parsed(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError([f"{text}: must be KEY=VALUE, such as max_gpus=16"])
    return key, yaml.safe_load(value)


def _set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key, and create the objects that contain it. null removes a nested value."""
    *outer, last = key.split(".")
    for name in outer:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    if outer and value is None:
        values.pop(last, None)
    else:
        values[last] = value


def _utc(at: datetime | None) -> datetime | None:
    return at.replace(tzinfo=UTC) if at is not None else None
