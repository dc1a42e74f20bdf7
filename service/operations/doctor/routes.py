"""Route /v1/doctor: all checks of a control plane, for admins."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request

from service.auth.authentication import Admin
from service.operations.doctor import dependencies, machine, work
from service.operations.doctor.findings import Check, Diagnosis, run_checks

router = APIRouter(tags=["operations"])


@router.get("/doctor", summary="Diagnose the service")
def diagnose(request: Request, caller: Admin) -> Diagnosis:
    """Run all checks of this control plane and its dependencies. Requires a key for all projects.

    Takes a few seconds at most: an unresponsive dependency is reported as an error. The storage check writes and
    removes one small file.
    """
    caller.require_all_projects()
    state = request.app.state
    findings = run_checks(checks_of(state), state.doctor_calls)
    return Diagnosis(version=version("amd-service"), findings=findings)


def checks_of(state: Any) -> dict[str, Check]:
    """Return all checks by name, given an application's state."""
    settings, engine = state.settings, state.engine
    tasks = [monitor.name for monitor in state.monitors if monitor.has_lease is not None]
    checks: dict[str, Check] = {
        "database": partial(dependencies.check_database, engine),
        "clock": partial(dependencies.check_clock, engine),
        "storage": partial(dependencies.check_storage, settings.root),
        "ray": partial(dependencies.check_ray, state.cluster, autoscaling=settings.autoscaling),
        "loops": partial(work.check_loops, state.monitors),
        "leases": partial(work.check_leases, engine, tasks),
        "queue": partial(work.check_queue, engine),
        "jobs": partial(work.check_stuck_jobs, engine, settings.start_timeout_s),
        "deployments": partial(work.check_deployments, engine),
        "webhooks": partial(work.check_webhooks, engine),
        "versions": machine.check_versions,
        "settings": partial(machine.check_settings, settings),
    }
    for name, path in machine.local_folders(settings).items():
        checks[name] = partial(machine.check_space, name, path)
    return checks
