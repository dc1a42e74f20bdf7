"""`amd doctor`: check the selected service, its dependencies and this machine, and suggest fixes."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from service.cli.connection import NO_SERVICE, configured_target, connected_to, local_stack, service_target
from service.cli.console import print_progress
from service.cli.exit_codes import FAILURE, SUCCESS
from service.cli.listing import Listing, Output, chosen_format, print_list
from service.cli.options import AsJson
from service.cli.tables import Column

if TYPE_CHECKING:
    from service.cli.connection import ServiceTarget
    from service.operations.doctor.findings import Finding

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}

FINDINGS: Listing[Finding] = Listing(
    columns=(
        Column("check", lambda finding: finding.check, wraps=False),
        Column("", lambda finding: Text(finding.severity, COLOURS[finding.severity]), wraps=False),
        Column("finding", lambda finding: finding.message, narrow=24),
        Column("what to do", lambda finding: finding.remedy, narrow=20),
    ),
    empty="no findings",
)


def doctor(output: Output = "table", as_json: AsJson = False) -> None:
    """Check the service and its dependencies, and suggest fixes; the exit code is 1 if a check finds an error."""
    chosen = chosen_format(output, as_json)
    if configured_target() is None and local_stack() is None:
        findings = _without_service(NO_SERVICE)
    else:
        target = service_target()
        if chosen == "table":
            print_progress(str(target))
        findings = _diagnose(target)
    print_list(FINDINGS, lambda: findings, chosen, watch=False)
    raise typer.Exit(FAILURE if any(finding.severity == "error" for finding in findings) else SUCCESS)


def _diagnose(target: ServiceTarget) -> list[Finding]:
    from service.client import ApiError, NoAnswer
    from service.operations.doctor.findings import problem

    with connected_to(target) as client:
        try:
            diagnosis = client.doctor()
        except NoAnswer as error:
            return _without_service(str(error))
        except ApiError as error:
            if error.problem.status < 500:  # such as a key without the required scope
                raise
            remedy = "see the checks below, and the log of the control plane"
            findings = [problem("service", f"{target.url}: {error}", remedy)]
            return [*findings, *_from_readiness(client.health())]
    return [_compare_versions(target, diagnosis.version), *diagnosis.findings]


def _from_readiness(health: dict[str, dict[str, str]]) -> list[Finding]:
    """Return a finding for each part that /readyz reports; it works without a key and without the database."""
    from service.operations.doctor.findings import ok, problem

    return [
        ok(name, "responds") if report == "ok" else problem(name, report, f"make sure that the {name} responds")
        for name, report in health.get("parts", {}).items()
    ]


def _compare_versions(target: ServiceTarget, of_service: str) -> Finding:
    from service.operations.doctor.findings import ok, warning

    own = version("amd-service")
    if own != of_service:
        message = f"{target.url} responds; it has version {of_service}, this command has version {own}"
        return warning("service", message, "install the same version on both sides")
    return ok("service", f"{target.url} responds, version {of_service}")


def _without_service(reason: str) -> list[Finding]:
    """Check what can be checked without the service: the parts of this machine's stack, and its disks."""
    from service.operations.doctor import machine
    from service.operations.doctor.findings import problem
    from service.settings import Settings
    from service.stack import StackError
    from service.stack import status as stack_status

    findings = [problem("service", reason, "run `amd up`, or check the address, the network and the control plane")]
    try:
        stack = stack_status()
        findings += [
            problem(part.name, part.health, f"run `amd up`; see {stack.data_dir / 'logs' / part.name}.log")
            for part in stack.parts
            if part.health != "ok"
        ]
    except StackError as error:
        findings.append(problem("stack", str(error), "follow the message"))
    folders = machine.local_folders(Settings())
    return [*findings, *(machine.check_space(name, path) for name, path in folders.items()), machine.check_versions()]
