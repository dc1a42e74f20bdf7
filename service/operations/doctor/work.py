"""Check that work progresses: background loops, leases, the queue, jobs in transition, and webhooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sqlalchemy import Engine, and_, func, or_, select
from sqlalchemy.orm import Session

from service.background import StepMonitor
from service.db.leases import holders
from service.db.models import Delivery, Deployment, Job
from service.jobs.schemas import WAITING
from service.operations.doctor.findings import Finding, ok, problem, warning
from service.web.formats import plural
from service.webhooks.store import GIVEN_UP
from service.webhooks.store import WAITING as WAITING_DELIVERY

LONG_WAIT_S = 3600.0
MARGIN_S = 120.0  # added to deadlines before a job counts as stuck
DELETION_S = 3600.0
OVERDUE_S = 600.0
DAY_S = 86_400.0
NAMED = 5  # maximum number of objects that a message names


def check_loops(monitors: Sequence[StepMonitor]) -> Finding:
    """Check that every background loop of this control plane completes its steps."""
    if not monitors:
        return warning("loops", "this process runs no background loops", "start it with `python -m service`")
    late = [f"{monitor.name}: {report}" for monitor in monitors if (report := monitor.report()) != "ok"]
    if late:
        remedy = "see its log; if a loop hangs, make its dependency respond or restart the control plane"
        return problem("loops", "; ".join(late), remedy)
    return ok("loops", ", ".join(f"{monitor.name} {monitor.age_s:.0f} s ago" for monitor in monitors))


def check_leases(engine: Engine, tasks: Sequence[str]) -> Finding:
    """Check that each task reserved for a single control plane is performed by one."""
    held = holders(engine)
    if missing := [task for task in tasks if task not in held]:
        message = f"no control plane performs: {', '.join(missing)}"
        return problem("leases", message, "if this persists for a minute, restart a control plane, and see its log")
    return ok("leases", ", ".join(f"{task} by {holder[:8]}" for task, holder in sorted(held.items())) or "none needed")


def check_queue(engine: Engine, clock: Callable[[], float] = time.time) -> Finding:
    """Check how long the oldest job has been waiting, and for what."""
    query = select(Job.id, Job.created_at, Job.message).where(Job.state.in_(WAITING), Job.origin == "api")
    with Session(engine.execution_options(reads_only=True)) as session:
        count = session.scalar(select(func.count()).select_from(query.subquery())) or 0
        oldest = session.execute(query.order_by(Job.created_at).limit(1)).first()
    if oldest is None:
        return ok("queue", "no jobs are waiting")
    age = clock() - oldest.created_at
    waiting = f"{plural(count, 'job')} waiting, the oldest ({oldest.id}) for {age / 60:.0f} min"
    message = f"{waiting}: {oldest.message or 'no obstacle'}"
    if age > LONG_WAIT_S:
        remedy = "add nodes, raise the limits AMD_MAX_RUNNING and AMD_PROJECT_MAX_*, or cancel jobs that cannot fit"
        return warning("queue", message, remedy)
    return ok("queue", message)


def check_stuck_jobs(engine: Engine, start_timeout_s: float, clock: Callable[[], float] = time.time) -> Finding:
    """Check that no job is stuck in a transitional state."""
    now = clock()
    stuck = or_(
        and_(Job.state == "starting", Job.started_at < now - start_timeout_s - MARGIN_S),
        and_(Job.state.in_(("pausing", "cancelling")), Job.stop_by < now - MARGIN_S),
        and_(Job.state == "deleting", Job.changed_at < now - DELETION_S),
    )
    query = select(Job.id, Job.state).where(stuck).order_by(Job.changed_at)
    with Session(engine.execution_options(reads_only=True)) as session:
        count = session.scalar(select(func.count()).select_from(query.subquery())) or 0
        found = session.execute(query.limit(NAMED)).all()
    if not count:
        return ok("jobs", "no job is stuck in a transition")
    names = ", ".join(f"{job_id} ({state})" for job_id, state in found)
    remedy = "see `amd jobs show ID`, and the log of the control plane that holds the reconciler lease"
    return problem("jobs", f"{plural(count, 'job')} stuck: {names}", remedy)


def check_webhooks(engine: Engine, clock: Callable[[], float] = time.time) -> Finding:
    """Check that deliveries are attempted on time and accepted."""
    now = clock()
    with Session(engine.execution_options(reads_only=True)) as session:

        def count(*conditions: object) -> int:
            return session.scalar(select(func.count()).select_from(Delivery).where(*conditions)) or 0  # type: ignore[arg-type]

        waiting = count(Delivery.state == WAITING_DELIVERY)
        overdue = count(Delivery.state == WAITING_DELIVERY, Delivery.not_before < now - OVERDUE_S)
        given_up = count(Delivery.state == GIVEN_UP, Delivery.not_before > now - DAY_S)
    message = f"{waiting} deliveries are waiting, {overdue} of them overdue; {given_up} were given up in the last day"
    if overdue:
        return problem("webhooks", message, "check the webhooks loop in /readyz, and the control planes' logs")
    if given_up:
        remedy = "find the receiver with `amd webhooks list` and `amd webhooks deliveries ID`, then fix or delete it"
        return warning("webhooks", message, remedy)
    return ok("webhooks", message)


def check_deployments(engine: Engine) -> Finding:
    """Check that no deployment has failed."""
    with Session(engine.execution_options(reads_only=True)) as session:
        found = session.execute(select(Deployment.name, Deployment.state, Deployment.message)).all()
    failed = [f"{name}: {message}" for name, state, message in found if state == "failed"]
    if failed:
        remedy = "follow the message; `amd encoders deployments` shows all deployments"
        return problem("deployments", "; ".join(failed[:NAMED]), remedy)
    return ok("deployments", f"{plural(len(found), 'deployment')}, none has failed")
