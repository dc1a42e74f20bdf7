"""Check the locations of a job's config: against the URI policy and, where jobs run on this machine, for missing files.

The control plane checks a request; the driver checks the stored config again on the cluster, where symlinks may resolve
differently.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from pydantic import BaseModel

from amd.config import ConfigError
from amd.config.locations import WRITTEN
from amd.data.dataset.shards import has_pattern
from amd.storage import local_path
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


def check_files_exist(config: BaseModel) -> None:
    """Check that local files and folders that a config reads exist on this machine; patterns are not expanded.

    Call this after `check_locations`, so that nobody learns which other files exist. Raises ConfigError.
    """
    missing = [
        f"{field}={value} does not exist on the service's machine; check the path"
        for field, value, role in locations_of(config)
        if role not in WRITTEN and _is_local_path(value) and not os.path.exists(local_path(value))
    ]
    if missing:
        raise ConfigError(missing)


def _is_local_path(value: str) -> bool:
    return value.startswith(("/", "file:///", "local:///")) and not has_pattern(value)
