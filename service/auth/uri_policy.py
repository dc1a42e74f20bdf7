"""URI policy: jobs may use data, weights and folders only under the storage root or a prefix in AMD_ALLOWED_URIS.

Independent of projects: `isolation` further restricts a caller to the project's folders under the storage root.

A URI is parsed once, into scheme, host and path segments. Syntax that different readers may interpret differently
(percent-encoding, `..`, chains, queries, user names) is rejected rather than resolved, so that every location has a
single canonical form that can be compared.

Covered: the URIs in a request and, on disks that this process can read, the current targets of symlinks.
Not covered: files that readers open on the nodes, with the nodes' permissions. A list file, folder or tar under an
allowed prefix can refer or link to files elsewhere, and a link or a DNS entry can change after the check. Anyone who
can write under an allowed prefix can therefore read everything that the nodes can read: grant the nodes no permissions
that jobs must not have, and allow no prefix that untrusted parties can write to. The same applies between projects: a
list file that names another project's files is not detected.

Does not read any files.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import accumulate, islice
from typing import NamedTuple

from amd.storage import is_remote, local_path
from service.web.errors import UriNotAllowed

# Names that are not locations. A bare name is the ID of an encoder or a run (amd.artifacts.discovery.encoder_url), or
# a file in the job's working folder, which Ray creates.
BARE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_NAME = re.compile(rf"demo:[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?|timm:[A-Za-z0-9][A-Za-z0-9._-]*|{BARE_NAME.pattern}")

_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/]*)(?P<path>/.*)?")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]{1,5})?")  # or bucket; no user name, no IPv6, no pattern
RANGE = re.compile(r"\{\d+\.\.\d+\}")  # {000..099}
_HTTP = ("http", "https")
_INTERNAL = (".localhost", ".localdomain", ".local", ".internal", ".home.arpa")
MAX_LENGTH = 2048
SIMILAR = 0.75  # from 0 to 1; how similar a misspelt segment is to that of an allowed prefix
MAX_MATCHES = 100_000


class Location(NamedTuple):
    """A parsed URI or path."""

    scheme: str
    host: str
    """Host or bucket; empty for local disks."""
    parts: tuple[str, ...]

    def contains(self, other: Location) -> bool:
        """Whether the other location is this one or under it: `/data` contains `/data/a`, not `/database`."""
        same = (self.scheme, self.host) == (other.scheme, other.host)
        return same and other.parts[: len(self.parts)] == self.parts


class UriPolicy:
    """Checks URIs against the storage root and the allowed prefixes."""

    def __init__(self, root: str, allowed: Sequence[str]) -> None:
        """Parse the prefixes. Raises ValueError if any is invalid."""
        self._prefixes = [_prefix(text) for text in (root, *allowed)]
        self._prefix_names = ", ".join((root, *allowed))
        self.allowed = tuple(
            _path(at) if at.scheme == "file" else text for text, at in zip(allowed, self._prefixes[1:], strict=True)
        )
        """The allowed prefixes, with absolute paths, which mean the same on another machine."""

    @property
    def root(self) -> Location:
        """The storage root, with symlinks resolved."""
        return _resolved(self._prefixes[0])

    def check(self, field: str, uri: str) -> None:
        """Check the URI of a config field. Raises UriNotAllowed."""
        self.resolve(field, uri)

    def resolve(self, field: str, uri: str) -> list[Location]:
        """Check the URI of a config field. Returns its location and the targets of any symlinks that it matches.

        The list is empty for a bare name. Raises UriNotAllowed.
        """
        if _NAME.fullmatch(uri):
            return []
        try:
            location = _parsed(uri)
            # The location itself is checked first, so that patterns are expanded only under the prefixes.
            found = [_resolved(location)]
            if self._is_allowed(found[0]):
                found += _linked(location)
        except ValueError as error:
            # The message omits the URI, which may contain a password.
            raise UriNotAllowed(f"{field}: {error}", field=field) from None
        if not all(map(self._is_allowed, found)):
            meant = self._probably_meant(location)
            remedy = f"Did you mean {meant}? " if meant else ""
            remedy += "To allow others, run `amd up --allow FOLDER`, or start the service with AMD_ALLOWED_URIS"
            raise UriNotAllowed(f"{field}={uri} must be under one of: {self._prefix_names}. {remedy}", field=field)
        return found

    def _probably_meant(self, location: Location) -> str | None:
        """Return the location with one misspelt segment of a prefix corrected, or None if no prefix is similar."""
        for prefix in self._prefixes:
            names, depth = (prefix.scheme, prefix.host, *prefix.parts), len(prefix.parts)
            given = (location.scheme, location.host, *location.parts[:depth])
            wrong = [(one, right) for one, right in zip(given, names, strict=False) if one != right]
            if len(given) != len(names) or len(wrong) != 1:
                continue
            ((misspelt, right),) = wrong
            if get_close_matches(misspelt, [right], n=1, cutoff=SIMILAR):
                return _name(prefix._replace(parts=prefix.parts + location.parts[depth:]))
        return None

    def _is_allowed(self, location: Location) -> bool:
        return any(_resolved(prefix).contains(location) for prefix in self._prefixes)


def _prefix(text: str) -> Location:
    """Parse a configured prefix. It is trusted, so a local prefix may be any absolute path."""
    try:
        if is_remote(text):
            return _parsed(text)
        if not text.startswith(("/", "~", "file:///", "local:///")):
            raise ValueError("must be an absolute path or a URI")
    except ValueError as error:
        raise ValueError(f"AMD_STORAGE or AMD_ALLOWED_URIS contains the invalid location {text}: {error}") from None
    return _local(os.path.abspath(local_path(text)))


def _parsed(uri: str) -> Location:
    """Parse a URI. Raises ValueError with the violated rule as its message."""
    if len(uri) > MAX_LENGTH:
        raise ValueError(f"must not be longer than {MAX_LENGTH} characters")
    if not uri.isprintable():
        raise ValueError("must not contain non-printable characters")
    for mark in ("\\", "%", "?", "#", "::"):
        if mark in uri:
            raise ValueError(f"must not contain {mark!r}; use the plain path")
    if uri.startswith("/"):
        return Location("file", "", _parts(uri))
    found = _URI.fullmatch(uri)
    if found is None:
        raise ValueError("must be an absolute path, a URI, demo:NAME, timm:NAME or an encoder ID")
    scheme, host, path = found["scheme"], found["host"], found["path"] or ""
    if scheme in ("file", "local"):  # amd.storage supports both
        if host:
            raise ValueError(f"a file URI must not have a host; use {scheme}:///path")
        return Location("file", "", _parts(path))
    if not _HOST.fullmatch(host):
        raise ValueError("its host or bucket must be a plain name")
    if scheme in _HTTP and not _is_public_name(host):
        raise ValueError("its host must be a public name; addresses and internal names are never allowed")
    return Location(scheme, host, _parts(path))


def _parts(path: str) -> tuple[str, ...]:
    inner = path.removeprefix("/")
    parts = tuple(inner.removesuffix("/").split("/")) if inner else ()
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("its path must not contain '.', '..' or '//'; use the plain path")
    return parts


def _is_public_name(host: str) -> bool:
    """Whether a host is a public name. Names that some resolvers treat as addresses, such as 127.1, are not."""
    name = host.partition(":")[0].lower().removesuffix(".")
    last = name.rpartition(".")[2]
    return "." in name and not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last) and not name.endswith(_INTERNAL)


def _resolved(location: Location) -> Location:
    """Return the location with symlinks resolved: on a local disk, any segment may be a symlink. Raises ValueError."""
    if location.scheme != "file":
        return location
    try:
        return _local(os.path.realpath(_path(location)))
    except OSError as error:
        raise ValueError(f"cannot be resolved on this machine: {error.strerror}") from None


def _linked(location: Location) -> Iterator[Location]:
    """Yield the targets of the symlinks that a pattern matches.

    Every prefix of the pattern is expanded, because a linked folder may not contain matching files yet. If a pattern
    has a range of numbers, all its other characters are literal, as in amd.data.dataset.shards. Raises ValueError
    if it matches too many files.
    """
    if location.scheme != "file":
        return
    pieces = RANGE.split(_path(location))
    pattern = "[0-9]*".join(map(glob.escape, pieces)) if len(pieces) > 1 else pieces[0]
    for folder in accumulate(pattern.split("/"), "{}/{}".format):
        if glob.has_magic(folder):
            found = list(islice(glob.iglob(folder, recursive=True, include_hidden=True), MAX_MATCHES + 1))
            if len(found) > MAX_MATCHES:
                raise ValueError(f"matches more than {MAX_MATCHES} files; use the folder that contains them")
            yield from (_resolved(_local(each)) for each in found if os.path.islink(each))


def _local(path: str) -> Location:
    return Location("file", "", tuple(part for part in path.split("/") if part))


def _name(location: Location) -> str:
    return _path(location) if location.scheme == "file" else f"{location.scheme}://{location.host}{_path(location)}"


def _path(location: Location) -> str:
    return "/" + "/".join(location.parts)
