"""The form for a new job or a modified copy of a job, with presets and with fields from the config's schema.

The form is validated while the user types. Validation and submission use the same code as the REST routes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from amd.config import ConfigError
from amd.presets.load import PRESETS_BY_KIND
from service.auth.authentication import Principal, Submitter
from service.auth.sessions import PREFIX
from service.console.forms import FormDep, FormValues, parse
from service.console.rendering import redirect, render
from service.console.schema_fields import config_fields, with_values
from service.console.security import ConsoleRoute
from service.jobs import catalog
from service.jobs import routes as jobs_api
from service.jobs.details.changes import clone_request
from service.jobs.details.commands import preset_arguments
from service.jobs.details.config_diff import preset_values
from service.jobs.details.schemas import CloneRequest
from service.jobs.kinds import KINDS, JobKind
from service.jobs.routes import Config, Jobs, Locations, Visible
from service.jobs.schemas import JobRequest, ValidateView
from service.jobs.store import JobStore
from service.web.errors import ServiceError

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

FIELD = "o."  # prefix of the names of config fields in the form
DEFAULT_PRESET = "demo-image-amd"  # needs neither data nor weights
COPY_SUFFIX = " (copy)"
MAX_NAME = 200  # characters of a job's name
PRESET_KINDS = {"search": "train"}  # kinds that use the presets of another kind


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
    return render(request, "new_job.html", kinds=list(KINDS), given=given, **context)


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
    commands: dict[str, str] = {}
    try:
        body = _request_of(form, jobs, caller)
        commands = _commands(body, form, str(request.base_url).rstrip("/"))
        found = CheckResult(catalog.validate_request(body, caller, settings, policy, request), (), {})
    except (ServiceError, ConfigError) as error:
        found = _problems(error)
    except RequestValidationError as error:
        found = CheckResult(None, tuple(f"{_name(one['loc'])}: {one['msg']}" for one in error.errors()), {})
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
    labels = dict(part.strip().split("=", 1) for part in form.text("labels").split(",") if "=" in part)
    common: dict[str, Any] = {
        "labels": labels,
        "priority": form.text("priority") or 0,
        "name": form.text("name") or None,
    }
    if form.text("original"):
        job = jobs.get(form.text("original"), caller.project)
        return clone_request(job, parse(CloneRequest, {"overrides": overrides, **common}))
    kind, preset = form.text("kind"), form.text("preset") or None
    config: dict[str, Any] | None = None if preset else {}
    if kind == "search":  # its preset is the run that it varies
        config = _nested({key: value for key, value in overrides.items() if not key.startswith("train.")})
        overrides = {key: value for key, value in overrides.items() if key.startswith("train.")}
    values = {"kind": kind, "preset": preset, "config": config, "overrides": overrides, **common}
    return parse(JobRequest, {**values, "project": form.text("project") or None})


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


def _name(location: Sequence[Any]) -> str:
    return ".".join(map(str, location[1:])) or "the form"


def _commands(request: JobRequest, form: FormValues, url: str) -> dict[str, str]:
    """Return the equivalent curl, `amd` and Ray commands for a job."""
    original = form.text("original")
    overrides = _overrides(form)
    body = request.model_dump(mode="json", exclude_defaults=True)
    if original:
        body = {name: value for name, value in {"overrides": overrides, "name": request.name}.items() if value}
    path = f"/v1/jobs/{original}/clone" if original else "/v1/jobs"
    found = {
        "curl": f'curl -X POST {url}{path} -H "Authorization: Bearer $AMD_KEY" \\\n'
        f"     -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    }
    if request.preset and request.config is None and not original:
        rest = preset_arguments(request.preset, overrides)
        found["amd"] = f"amd {request.kind} {rest} --submit"
        if request.kind == "train":
            found["ray job submit"] = f"ray job submit -- python -m amd.training {rest}"
    return found
