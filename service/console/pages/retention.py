"""The retention page: the policy, past collections, a dry run, and a collection."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from service.auth.authentication import Admin, Principal
from service.auth.sessions import PREFIX
from service.console.forms import FormDep, FormValues, parse
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.operations.retention import routes as retention_api
from service.operations.retention.policy import RetentionPolicy
from service.operations.retention.routes import GcReport, GcRequest

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

FIELDS = {name: str(field.description) for name, field in RetentionPolicy.model_fields.items()}


@router.get("/retention")
def show_retention(request: Request, caller: Admin) -> Response:
    retention = retention_api.get_retention(request, caller)
    return render(request, "retention.html", retention=retention, fields=FIELDS)


@router.post("/retention/dry-run")
async def plan_collection(request: Request, caller: Admin, form: FormDep) -> Response:
    """Report what the policy in the form would remove."""
    return await _collect(request, caller, form, dry_run=True)


@router.post("/retention/apply")
async def apply_policy(request: Request, caller: Admin, form: FormDep) -> Response:
    """Apply the policy in the form once."""
    return await _collect(request, caller, form, dry_run=False)


async def _collect(request: Request, caller: Admin, form: FormValues, *, dry_run: bool) -> Response:
    policy: dict[str, Any] = {name: form.text(name) or None for name in FIELDS}
    report = await retention_api.collect_garbage(
        request, caller, parse(GcRequest, {"dry_run": dry_run, "policy": policy})
    )
    return await run_in_threadpool(_render_report, request, caller, report)


def _render_report(request: Request, caller: Principal, report: GcReport) -> Response:
    collections = retention_api.get_retention(request, caller).collections
    return render(request, "fragments/retention_report.html", report=report, collections=collections)
