"""`amd gc`: remove old jobs, checkpoints, logs and leftover files, on a service or under a storage root."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from amd.config import ConfigError, broken_rule
from service.cli.connection import connected
from service.cli.console import out, print_plain, print_progress
from service.cli.options import AsJson
from service.cli.tables import Column, fitted_table

if TYPE_CHECKING:
    from service.operations.retention.policy import RetentionPolicy
    from service.operations.retention.routes import GcReport, RemovedKind

NO_POLICY = (
    "no retention policy is set, so user data is kept; set AMD_RETAIN_…_DAYS, or pass options such as "
    "--checkpoints-days 30"
)


def _days(text: str) -> Any:
    return typer.Option(metavar="DAYS", help=text)


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what would be removed, to the byte, without removing it.")
    ] = False,
    jobs_days: Annotated[float | None, _days("Remove jobs, runs and logs this many days after the jobs end.")] = None,
    trials_days: Annotated[float | None, _days("Remove trial runs this many days after the sweep ends.")] = None,
    checkpoints_days: Annotated[float | None, _days("Remove checkpoints this many days after the run ends.")] = None,
    logs_days: Annotated[float | None, _days("Remove logs this many days after the job or run ends.")] = None,
    orphans_days: Annotated[float | None, _days("Remove incomplete files older than this many days.")] = None,
    history_days: Annotated[float | None, _days("Remove records of objects this many days after deletion.")] = None,
    deliveries_days: Annotated[float | None, _days("Remove webhook deliveries this many days after they end.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Storage root to clean without a service; runs that jobs own are kept.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove old jobs, checkpoints, logs and leftovers. Without options, the service's policy (AMD_RETAIN_*) applies.

    Anything that an encoder card, an alias, a deployment or an unfinished job refers to is kept.
    """
    from service.operations.retention.policy import RetentionPolicy
    from service.operations.retention.routes import GcRequest

    given = {
        "jobs_days": jobs_days,
        "trials_days": trials_days,
        "checkpoints_days": checkpoints_days,
        "logs_days": logs_days,
        "orphans_days": orphans_days,
        "history_days": history_days,
        "deliveries_days": deliveries_days,
    }
    chosen = {name: days for name, days in given.items() if days is not None}
    try:
        policy = RetentionPolicy(**chosen) if chosen else None
    except ValidationError as error:
        problems = [f"--{str(found['loc'][0]).replace('_', '-')}: {broken_rule(found)}" for found in error.errors()]
        raise ConfigError(problems) from None
    if storage is not None:
        report = _clean_root(storage, policy, dry_run)
    else:
        with connected(as_json, announce=not as_json) as client:
            report = client.collect_garbage(GcRequest(dry_run=dry_run, policy=policy))
    print(report.model_dump_json()) if as_json else _print_report(report)


def _clean_root(storage: str, policy: RetentionPolicy | None, dry_run: bool) -> GcReport:
    from amd.storage import resolve_root
    from service.operations.retention.collection import collect
    from service.operations.retention.policy import policy_of
    from service.operations.retention.routes import report_of
    from service.settings import Settings

    root, policy = resolve_root(storage), policy or policy_of(Settings())
    print_progress(f"storage root {root}")
    return report_of(collect(root, policy, dry_run=dry_run), policy, dry_run=dry_run)


def _print_report(report: GcReport) -> None:
    if report.kinds:
        columns: tuple[Column[RemovedKind], ...] = (
            Column("kind", lambda kind: kind.kind.replace("_", " "), wraps=False),
            Column("items", lambda kind: f"{kind.items:,}" if kind.items else "", wraps=False),
            Column("files", lambda kind: f"{kind.files:,}", wraps=False),
            Column("bytes", lambda kind: f"{kind.bytes:,}", wraps=False),
            Column("rows", lambda kind: f"{kind.rows:,}", wraps=False),
        )
        out.print(fitted_table(columns, report.kinds, out.width))
    verb = "would free" if report.dry_run else "freed"
    print_plain(f"{verb} {report.bytes:,} bytes in {report.files:,} files and {report.rows:,} database rows")
    if report.skipped:
        print_plain(f"{report.skipped:,} items were kept because they are now in use or could not be removed")
    if not report.policy.removes_user_data:
        print_progress(NO_POLICY)
