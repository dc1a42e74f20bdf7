"""Which data, weights and folders a job may name: what lies below the storage root or a prefix of AMD_ALLOWED_URIS.

A URI is parsed once, into scheme, host and parts of its path. Whatever could mean something else to one of the readers
(percent-encoding, `..`, chains, queries, user names) is refused rather than understood, so there is one spelling of a
place, and that one is compared.

What is covered: the names in a request; on the disks that this process sees, also where links lead that are there now.
What is not: the readers run on the nodes, with the nodes' rights. What a list file, a folder or a tar below an allowed
prefix holds can name or link to files elsewhere, and a link or a DNS entry can change after the check. Whoever may
write below an allowed prefix can therefore read what the nodes can read: give the nodes no rights that jobs should not
have, and allow no prefix that strangers write to. All projects share the storage root: a job of one can read what
another's runs have written there.

Knows nothing of what the files are.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

from amd.storage import is_remote, local_path
from service.web.errors import UriNotAllowed

# Names that are not locations. A bare name is the id of an encoder or a run (amd.artifacts.discovery.encoder_url), or
# a file of that name in the job's own working folder, which is Ray's.
_NAME = re.compile(r"demo:[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?|timm:[A-Za-z0-9][A-Za-z0-9._-]*|[A-Za-z0-9][A-Za-z0-9_-]*")

_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/]*)(?P<path>/.*)?")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]{1,5})?")  # or bucket; no user name, no IPv6, no pattern
_RANGE = re.compile(r"\{\d+\.\.\d+\}")  # {000..099}
_HTTP = ("http", "https")
_INTERNAL = (".localhost", ".localdomain", ".local", ".internal", ".home.arpa")
LONGEST = 2048
MOST_MATCHES = 100_000


class Place(NamedTuple):
    scheme: str
    host: str
    """Or bucket; empty for this machine's disks."""
    parts: tuple[str, ...]

    def holds(self, other: Place) -> bool:
        """Itself and what lies below: `/data` holds `/data/a`, not `/database`."""
        same = (self.scheme, self.host) == (other.scheme, other.host)
        return same and other.parts[: len(self.parts)] == self.parts


class UriPolicy:
    def __init__(self, root: str, allowed: Sequence[str]) -> None:
        """Raises ValueError for a prefix that is no place."""
        self._prefixes = [_prefix(text) for text in (root, *allowed)]
        self._told = ", ".join((root, *allowed))

    def check(self, field: str, uri: str) -> None:
        """Raises UriNotAllowed."""
        if _NAME.fullmatch(uri):
            return
        try:
            place = _parsed(uri)
            # First the place itself: patterns are followed below the prefixes only.
            within = self._holds(_resolved(place)) and all(map(self._holds, _linked(place)))
        except ValueError as error:
            # The URI itself is not repeated: it may hold a password.
            raise UriNotAllowed(f"{field}: {error}", field=field) from None
        if not within:
            message = f"{field}={uri} must lie below one of: {self._told} (AMD_ALLOWED_URIS adds others)"
            raise UriNotAllowed(message, field=field)

    def check_all(self, pairs: Iterable[tuple[str, str]]) -> None:
        """(field, URI). Raises UriNotAllowed for the first that is not."""
        for field, uri in pairs:
            self.check(field, uri)

    def _holds(self, place: Place) -> bool:
        return any(_resolved(prefix).holds(place) for prefix in self._prefixes)


def _prefix(text: str) -> Place:
    """Of the configuration, which is trusted: a local one may be spelled in any way that is absolute."""
    try:
        if is_remote(text):
            return _parsed(text)
        if not text.startswith(("/", "~", "file:///", "local:///")):
            raise ValueError("it must be an absolute path or a URI")
    except ValueError as error:
        raise ValueError(f"AMD_STORAGE or AMD_ALLOWED_URIS: {text}: {error}") from None
    return _local(os.path.abspath(local_path(text)))


def _parsed(uri: str) -> Place:
    """Raises ValueError with the rule that it breaks."""
    if len(uri) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    if not uri.isprintable():
        raise ValueError("it holds a character that does not print")
    for mark in ("\\", "%", "?", "#", "::"):
        if mark in uri:
            raise ValueError(f"it may not hold {mark!r}; write the plain path")
    if uri.startswith("/"):
        return Place("file", "", _parts(uri))
    found = _URI.fullmatch(uri)
    if found is None:
        raise ValueError("give an absolute path, a URI, demo:NAME, timm:NAME or the id of an encoder")
    scheme, host, path = found["scheme"], found["host"], found["path"] or ""
    if scheme in ("file", "local"):  # amd.storage knows both
        if host:
            raise ValueError(f"a file has no host; write {scheme}:///path")
        return Place("file", "", _parts(path))
    if not _HOST.fullmatch(host):
        raise ValueError("its host or bucket must be a plain name")
    if scheme in _HTTP and not _is_public_name(host):
        raise ValueError("its host must be a public name; addresses and internal names are never allowed")
    return Place(scheme, host, _parts(path))


def _parts(path: str) -> tuple[str, ...]:
    inner = path.removeprefix("/")
    parts = tuple(inner.removesuffix("/").split("/")) if inner else ()
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("its path may hold no '.', no '..' and no '//'; write it plainly")
    return parts


def _is_public_name(host: str) -> bool:
    """A number at the end makes it an address for some resolver: 127.1, 0x7f000001, 2130706433, 0177.0.0.1."""
    name = host.partition(":")[0].lower().removesuffix(".")
    last = name.rpartition(".")[2]
    return "." in name and not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last) and not name.endswith(_INTERNAL)


def _resolved(place: Place) -> Place:
    """Where it is now: on a disk, any part of it may be a link, or come to be one. Raises ValueError."""
    if place.scheme != "file":
        return place
    try:
        return _local(os.path.realpath(_path(place)))
    except OSError as error:
        raise ValueError(f"it cannot be followed on this machine: {error.strerror}") from None


def _linked(place: Place) -> Iterator[Place]:
    """Where the links lead that a pattern matches, folder by folder: below one, there may be nothing to match yet.

    As in amd.data.dataset.shards: beside a range of numbers, all else is meant literally. Raises ValueError.
    """
    if place.scheme != "file":
        return
    pieces = _RANGE.split(_path(place))
    pattern = "[0-9]*".join(map(glob.escape, pieces)) if len(pieces) > 1 else pieces[0]
    for folder in accumulate(pattern.split("/"), "{}/{}".format):
        if glob.has_magic(folder):
            found = list(islice(glob.iglob(folder, recursive=True, include_hidden=True), MOST_MATCHES + 1))
            if len(found) > MOST_MATCHES:
                raise ValueError(f"it matches more than {MOST_MATCHES} files; name their folder")
            yield from (_resolved(_local(each)) for each in found if os.path.islink(each))


def _local(path: str) -> Place:
    return Place("file", "", tuple(part for part in path.split("/") if part))


def _path(place: Place) -> str:
    return "/" + "/".join(place.parts)
