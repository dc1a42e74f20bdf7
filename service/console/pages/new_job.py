"""The form for a new job or a modified copy of a job, with presets and with fields from the config's schema.

The form is validated while the user types. Validation and submission use the same code as the REST routes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from amd.config import ConfigError, broken_rule
from amd.presets.load import PRESETS_BY_KIND
from service.auth.authentication import Principal, Submitter
from service.auth.sessions import PREFIX
from service.console.forms import FormDep, FormValues, parse, parse_labels
from service.console.rendering import redirect, render
from service.console.schema_fields import config_fields, with_use, with_values
from service.console.security import ConsoleRoute
from service.db.models import Job
from service.jobs import catalog
from service.jobs import routes as jobs_api
from service.jobs.details.changes import clone_request
from service.jobs.details.commands import amd_command, clone_command, ray_command
from service.jobs.details.config_diff import preset_values
from service.jobs.details.schemas import CloneRequest
from service.jobs.kinds import KINDS, JobKind
from service.jobs.routes import Config, Jobs, Locations, Visible
from service.jobs.schemas import JobRequest, ValidateView
from service.jobs.store import JobStore
from service.web.errors import ServiceError

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

FIELD = "o."  # prefix of the names of config fields in the form
METADATA = ("name", "labels", "priority", "project")  # fields that are not part of the config
DEFAULT_PRESET = "demo-image-amd"  # needs neither data nor weights
COPY_SUFFIX = " (copy)"
MAX_NAME = 200  # characters of a job's name
MAX_SHOWN = 60  # characters of a value in a message about it
RAY_NOTE = (
    "Ray starts this run at once, outside the service's queue: labels, priority, project and retries do not apply. The "
    "name becomes the run's ID, so each run needs another name. The service lists the run in the project default."
)
PRESET_KINDS = {"search": "train"}  # kinds that use the presets of another kind


class EquivalentCommand(NamedTuple):
    """A command that does the same as the form."""

    tool: str
    text: str
    note: str = ""
    """What the command does differently."""


class CheckResult(NamedTuple):
    """Result of validating the form."""

    valid: ValidateView | None
    problems: tuple[str, ...]
    fields: dict[str, str]
    """Problems by config key."""


@router.get("/new")
def new_job(
    request: Request,
    caller: Submitter,
    kind: JobKind = "train",
    preset: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """Show the form for a preset, prefilled from query parameters that have the form's field names."""
    presets = PRESETS_BY_KIND.get(PRESET_KINDS.get(kind, kind), {})
    first = DEFAULT_PRESET if DEFAULT_PRESET in presets else next(iter(presets), "")
    chosen = preset if preset in presets else first
    values = preset_values(kind, chosen) or {}
    fields = with_values(config_fields(kind), {"train": values} if kind == "search" else values)
    return _form(request, kind=kind, preset=chosen, presets=presets, fields=fields, original=None, copy_name="")


@router.get("/jobs/{job_id}/clone")
def clone_job(request: Request, job: Visible, caller: Submitter) -> Response:
    kind: JobKind = job.kind  # type: ignore[assignment]  # a stored kind
    fields = with_values(config_fields(kind), job.config)
    copy_name = f"{job.name[: MAX_NAME - len(COPY_SUFFIX)]}{COPY_SUFFIX}" if job.name else ""
    return _form(
        request,
        kind=kind,
        preset=job.preset or "",
        presets={},
        fields=fields,
        original=job,
        copy_name=copy_name,
    )


def _form(request: Request, **context: Any) -> Response:
    given = {name.removeprefix(FIELD): text for name, text in request.query_params.items() if name.startswith(FIELD)}
    fields = with_use(context.pop("fields"), given)
    typed = {name: request.query_params.get(name, "") for name in METADATA}
    missing = [field.key for field in fields if field.is_missing and field.is_used]
    has_values = bool(context["preset"]) and context["kind"] != "search" and not missing
    return render(
        request,
        "new_job.html",
        kinds=list(KINDS),
        summary=KINDS[context["kind"]].summary,
        given=given,
        typed=typed,
        fields=fields,
        missing=missing,
        is_checked=bool(context["original"] or given or has_values),
        **context,
    )


@router.post("/new/check")
def check_job(
    request: Request,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
    form: FormDep,
) -> Response:
    """Validate the current form, and show the estimate and the equivalent commands."""
    commands: list[EquivalentCommand] = []
    try:
        body = _request_of(form, jobs, caller)
        url = str(request.base_url).rstrip("/")
        if form.text("original"):
            commands = _copy_commands(jobs.get(form.text("original"), caller.project), _changes_of(form), url)
        else:
            commands = _commands(body, url, settings.root)
        found = CheckResult(catalog.validate_request(body, caller, settings, policy, request), (), {})
    except (ServiceError, ConfigError) as error:
        found = _problems(error)
    except RequestValidationError as error:
        found = CheckResult(None, tuple(_problem(one) for one in error.errors()), {})
    return render(request, "fragments/job_check.html", check=found, commands=commands)


@router.post("/new")
def submit_job(
    request: Request,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
    form: FormDep,
) -> Response:
    job = jobs_api.submit(_request_of(form, jobs, caller), caller, jobs, settings, policy, Response())
    return redirect(request, f"{PREFIX}/jobs/{job.id}")


def _request_of(form: FormValues, jobs: JobStore, caller: Principal) -> JobRequest:
    """Build a request from a form. Raises NotFound, or ConfigError or RequestValidationError for invalid fields."""
    overrides = _overrides(form)
    if form.text("original"):
        return clone_request(jobs.get(form.text("original"), caller.project), _changes_of(form))
    kind, preset = form.text("kind"), form.text("preset") or None
    config: dict[str, Any] | None = None if preset else {}
    if kind == "search":  # its preset is the run that it varies
        config = _nested({key: value for key, value in overrides.items() if not key.startswith("train.")})
        overrides = {key: value for key, value in overrides.items() if key.startswith("train.")}
    values = {"kind": kind, "preset": preset, "config": config, "overrides": overrides, **_metadata(form)}
    return parse(JobRequest, {**values, "priority": values["priority"] or 0, "project": form.text("project") or None})


def _changes_of(form: FormValues) -> CloneRequest:
    """Build the changes of a copy from a form. Raises RequestValidationError for invalid fields."""
    return parse(CloneRequest, {"overrides": _overrides(form), **_metadata(form)})


def _metadata(form: FormValues) -> dict[str, Any]:
    """Return the form's name, labels and priority; the name and the priority are null if they are empty."""
    labels = parse_labels(form.text("labels").split(","))
    return {"labels": labels, "priority": form.text("priority") or None, "name": form.text("name") or None}


def _overrides(form: FormValues) -> dict[str, Any]:
    """Return a form's config values, parsed as JSON where possible and kept as text otherwise."""
    found = {}
    for key, text in form.below(FIELD).items():
        if text:
            try:
                found[key] = json.loads(text)
            except (ValueError, RecursionError):
                found[key] = text
    return found


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Convert dotted keys to nested sections."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        node = result
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return result


def _problems(error: ServiceError | ConfigError) -> CheckResult:
    if isinstance(error, ConfigError):
        fields = {line.split("=", 1)[0].split(":", 1)[0].strip(): line for line in error.problems}
        return CheckResult(None, tuple(error.problems), fields)
    field = error.extra.get("field")
    return CheckResult(None, (error.message,), {str(field): error.message} if field else {})


def _problem(found: Mapping[str, Any]) -> str:
    """Return the field, its value if it is short, and the rule that it breaks."""
    name = ".".join(str(part) for part in found["loc"][1:] if part != "[key]") or "the form"
    value = found.get("input")
    shown = f"={value}" if isinstance(value, str | int | float) and len(str(value)) <= MAX_SHOWN else ""
    return f"{name}{shown}: {broken_rule(found)}"


def _commands(request: JobRequest, url: str, root: str) -> list[EquivalentCommand]:
    """Return the equivalent curl, `amd` and Ray commands for a job."""
    body = request.model_dump(mode="json", exclude_defaults=True)
    found = [EquivalentCommand("curl", _curl(f"{url}/v1/jobs", body))]
    if request.preset and request.config is None:
        found.append(EquivalentCommand("amd", amd_command(request)))
        if request.kind == "train":
            found.append(EquivalentCommand("ray job submit", ray_command(request, root), RAY_NOTE))
    return found


def _copy_commands(job: Job, changes: CloneRequest, url: str) -> list[EquivalentCommand]:
    """Return the equivalent curl and `amd` commands for a copy of a job."""
    body = changes.model_dump(mode="json", exclude_none=True)
    return [
        EquivalentCommand("curl", _curl(f"{url}/v1/jobs/{job.id}/clone", body)),
        EquivalentCommand("amd", clone_command(job, changes)),
    ]


def _curl(url: str, body: dict[str, Any]) -> str:
    return (
        f'curl -X POST {url} -H "Authorization: Bearer $AMD_KEY" \\\n'
        f"     -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
