"""Check every location of a job's config against the URI policy, before anything is opened.

The control plane checks a request; the driver checks the stored config again on the cluster, where symlinks may resolve
differently.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from service.jobs.kinds import OWN_ROLES, locations_of
from service.web.errors import UriNotAllowed


def check_locations(config: BaseModel, check: Callable[[str, str], None], root: str, output: str | None = None) -> None:
    """Check the locations in a config. `output` is the job's own output folder, if it already has one.

    `check`: called with (dotted field, value) for every other location; raises if the location is not allowed.

    Raises UriNotAllowed for the first location that is not allowed, and ConfigError if the teacher's recipe is
    invalid.
    """
    for field, value, role in locations_of(config):
        if role == "storage" and value != root:
            message = f"{field}={value}: the service stores all runs under its own storage root; omit the field"
            raise UriNotAllowed(message, field=field)
        if role == "output" and value != output:
            message = f"{field}={value}: a job writes to its own folder; omit the field"
            raise UriNotAllowed(message, field=field)
        if role not in OWN_ROLES:
            check(field, value)
