"""Check what a control plane depends on: database, clock, storage root and Ray."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from amd.storage import StorageError, check_writable
from service.db.engine import is_migrated
from service.db.leases import database_time
from service.jobs.execution.ray_jobs import Cluster
from service.operations.doctor.findings import Finding, ok, problem, warning
from service.web.errors import ClusterUnavailable
from service.web.formats import plural

SLOW_DATABASE_S = 0.25
SLOW_STORAGE_S = 2.0  # for writing, reading and removing one small file
CLOCK_WARNING_S = 5.0
CLOCK_ERROR_S = 60.0


def check_database(engine: Engine, clock: Callable[[], float] = time.monotonic) -> Finding:
    """Check that the database responds quickly and has the current schema."""
    began = clock()
    try:
        migrated = is_migrated(engine)
    except SQLAlchemyError as error:
        reason = str(error).splitlines()[0]
        remedy = "start the database, and check AMD_DATABASE_URL and the network"
        return problem("database", f"{engine.dialect.name} does not respond: {reason}", remedy)
    seconds = clock() - began
    if not migrated:
        remedy = "run `python -m service migrate`"
        return problem("database", f"the schema of {engine.dialect.name} is not up to date", remedy)
    message = f"{engine.dialect.name} responds in {seconds * 1000:.0f} ms"
    if seconds > SLOW_DATABASE_S:
        return warning("database", message, "check the database's load and disk, and the network connection to it")
    return ok("database", message)


def check_clock(engine: Engine, clock: Callable[[], float] = time.time) -> Finding:
    """Compare this machine's clock with the database's clock."""
    before = clock()
    with engine.connect() as connection:
        database = connection.scalar(select(database_time(engine))) or 0.0
    after = clock()
    skew = max(database - after, before - database, 0.0)
    if skew <= CLOCK_WARNING_S:
        return ok("clock", "the clocks of this machine and the database agree")
    make = problem if skew > CLOCK_ERROR_S else warning
    message = f"the clocks of this machine and the database differ by {skew:.0f} s, so times and deadlines are wrong"
    return make("clock", message, "synchronise both clocks with NTP")


def check_storage(root: str, clock: Callable[[], float] = time.monotonic) -> Finding:
    """Write, read and remove a small file on the storage root."""
    began = clock()
    try:
        check_writable(root)
    except StorageError as error:
        return problem("storage", str(error), "fix the permissions or credentials, or make the store reachable")
    seconds = clock() - began
    message = f"{root} can be read and written; a small file takes {seconds * 1000:.0f} ms"
    if seconds > SLOW_STORAGE_S:
        remedy = "check the store's load and the network connection to it: jobs write checkpoints and logs there"
        return warning("storage", message, remedy)
    return ok("storage", message)


def check_ray(cluster: Cluster, *, autoscaling: bool) -> Finding:
    """Check that Ray responds, and that it has resources for jobs."""
    try:
        found = cluster.capacity()
    except ClusterUnavailable as error:
        remedy = "run `amd up` for a stack on this machine; on a cluster, check the Ray head and AMD_RAY_DASHBOARD"
        return problem("ray", error.message, remedy)
    message = (
        f"Ray offers {plural(found.cpus, 'CPU')} and {plural(found.gpus, 'GPU')}, of which programs have reserved "
        f"{plural(found.used_cpus, 'CPU')} and {plural(found.used_gpus, 'GPU')}; a node offers all its cores unless "
        "--num-cpus sets another number"
    )
    if found.cpus == 0 and not autoscaling:
        return problem("ray", "no node offers CPUs, so no job can start", "add nodes to the Ray cluster")
    return ok("ray", message)
