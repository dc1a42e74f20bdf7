"""Find the IDs of runs, jobs and encoders that a document, such as a config, card or record, refers to.

Errs on the side of too many references, since anything referred to is kept: any string that equals an ID or contains a
path under `runs/`, `jobs/` or `encoders/` counts. Reads no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

_PATH = re.compile(r"(?:^|[/=:,])(?:runs|jobs|encoders)/([^/,]+)")
_PATTERN = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{[^}]*\}?")


def references(document: Any, ids: Collection[str]) -> set[str]:
    """Return the known IDs that a JSON value refers to."""
    found = set[str]()
    for text in _strings(document):
        if text in ids:
            found.add(text)
        for name in _PATH.findall(text):
            if _PATTERN.search(name):
                pattern = _BRACES.sub("*", name)
                found.update(each for each in ids if fnmatchcase(each, pattern))
            elif name in ids:
                found.add(name)
    return found


def reachable(roots: Iterable[str], referenced_by: Callable[[Collection[str]], Iterable[str]]) -> frozenset[str]:
    """Return the IDs reachable from `roots`. `referenced_by` returns the IDs that a set of IDs refers to."""
    found: set[str] = set()
    new = set(roots)
    while new:
        found |= new
        new = set(referenced_by(new)) - found
    return frozenset(found)


def _strings(document: Any) -> Iterator[str]:
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
