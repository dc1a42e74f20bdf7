"""Project isolation: which locations and IDs a project may use.

Under the storage root, `FOLDERS` contain the runs, jobs and encoders of every project. A request may refer only to its
own project's runs, jobs and encoders; those of other projects are reported as nonexistent. A location that may cover
several runs, jobs or encoders, such as the root itself or a pattern, is rejected. Everything else under the root is
user data, which all projects share, like the prefixes in AMD_ALLOWED_URIS.

Locations are compared in the canonical form of `uri_policy`, whose limits apply here too. Owners are looked up through
the `Owners` protocol.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Protocol

from amd.config import ConfigError
from amd.storage import SAME_STORE
from service.auth.uri_policy import BARE_NAME, RANGE, Location, UriPolicy
from service.web.errors import NotFound, UriNotAllowed

# Folders under the storage root, and what their subfolders contain; None: a cache that only the service's programs use.
FOLDERS = {"runs": "run", "jobs": "job", "encoders": "encoder", "embeddings": "encoder", "features": None}

_MAGIC = re.compile(rf"[*?\[]|{RANGE.pattern}")


class Owners(Protocol):
    """Looks up which project owns a run, job or encoder. Methods may raise StorageError."""

    def of_run(self, run_id: str) -> str | None:
        """Return the project of a run or job, or None if it does not exist."""

    def of_encoder(self, encoder_id: str) -> str | None:
        """Return the project of an encoder or of the job that will publish it; None if neither exists."""


class LocationPolicy:
    """Checks the locations and IDs in a request against the URI policy and the caller's project.

    `project`: the job's project or, for requests that do not start a job, the caller's; None covers all projects.
    """

    def __init__(self, uris: UriPolicy, owners: Owners) -> None:
        self._uris, self._owners = uris, owners

    def check(self, field: str, value: str, project: str | None) -> None:
        """Check a field's location or ID.

        Raises UriNotAllowed, or NotFound if it refers to a run, job or encoder that does not exist in the project.
        """
        locations = self._uris.resolve(field, value)
        if project is None:
            return
        if BARE_NAME.fullmatch(value) and self._owners.of_encoder(value) != project:
            remedy = "use an ID from this project, or the absolute path or URI of a file"
            raise _not_found(field, value, f"encoder or run {value!r}", project, remedy)
        for location in locations:
            self._check_owner(field, value, location, project)

    def check_all(self, pairs: Iterable[tuple[str, str]], project: str | None) -> None:
        """Check (field, location or ID) pairs. Raises the error of `check` for the first rejected pair."""
        for field, value in pairs:
            self.check(field, value, project)

    def check_new_encoder(self, encoder_id: str, project: str) -> None:
        """Check the ID that a project chose for a new encoder. Raises ConfigError if another project already uses it.

        All projects share one storage root, and therefore one ID namespace.
        """
        if self._owners.of_encoder(encoder_id) not in (None, project):
            raise ConfigError([f"id={encoder_id}: this ID is already taken; choose another ID"])

    def _check_owner(self, field: str, value: str, location: Location, project: str) -> None:
        path = _path_below(self._uris.root, location)
        if path is None:
            return
        names = [name for name in FOLDERS if not path or _may_match(path[0], name)]
        if not names:
            return
        kind, objects = FOLDERS[names[0]], path[1:]
        if not objects or path[0] != names[0] or kind is None or _MAGIC.search(objects[0]):
            folders = ", ".join(f"{name}/" for name in names)
            message = (
                f"{field}={value} covers {folders} of all projects; use a folder of your own data, or a single run"
            )
            raise UriNotAllowed(message, field=field)
        owner = self._owners.of_encoder(objects[0]) if kind == "encoder" else self._owners.of_run(objects[0])
        if owner != project:
            raise _not_found(
                field, value, f"{kind} {objects[0]!r}", project, "use one from this project, or shared data"
            )


def _not_found(field: str, value: str, what: str, project: str, remedy: str) -> NotFound:
    return NotFound(f"{field}={value}: there is no {what} in project {project!r}; {remedy}", field=field)


def _path_below(root: Location, location: Location) -> tuple[str, ...] | None:
    """Return a location or pattern relative to the root: empty if it covers the root, None if it is outside."""
    if (_store(root), root.host) != (_store(location), location.host):
        return None
    for part, own in zip(location.parts, root.parts, strict=False):
        if "**" in part:
            return ()
        if not _may_match(part, own):
            return None
    return location.parts[len(root.parts) :]


def _may_match(part: str, name: str) -> bool:
    """Whether a path segment may match this name: as a pattern, or on a case-insensitive disk."""
    return "**" in part or fnmatchcase(name.casefold(), RANGE.sub("[0-9]*", part).casefold())


def _store(location: Location) -> str:
    return SAME_STORE.get(location.scheme, location.scheme)
