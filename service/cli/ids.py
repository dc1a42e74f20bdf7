"""Find an id by its beginning, or by the beginning of its last part, if only one id matches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NoReturn

from amd.storage import listdir
from service.cli.console import fail
from service.cli.exit_codes import BAD_INPUT

SHOWN_MATCHES = 5


def matching_ids(text: str, ids: Iterable[str]) -> list[str]:
    """Return the id that equals `text`, else all ids that start with it or whose last part does."""
    found = [id for id in ids if id.startswith(text) or re.split("[-_]", id)[-1].startswith(text)]
    return [text] if text in found else found


def unique_id(text: str, ids: Iterable[str], kind: str, list_command: str) -> str:
    """Return the only id that matches. Otherwise list the candidates and exit with code 2.

    `kind`: noun for the messages. `list_command`: command that lists the existing ids.
    """
    found = matching_ids(text, ids) if text else []
    if not found:
        fail(f"no {kind} {text!r}; `{list_command}` lists the existing {kind}s", code=BAD_INPUT)
    if len(found) > 1:
        fail_ambiguous(text, found, kind)
    return found[0]


def stored_id(text: str, folder: str, kind: str) -> str:
    """Return the only matching name in a folder or URL; `text` itself if there is none. Exits if several match."""
    found = matching_ids(text, listdir(folder))
    if len(found) > 1:
        fail_ambiguous(text, found, kind)
    return found[0] if found else text


def fail_ambiguous(text: str, candidates: list[str], kind: str) -> NoReturn:
    more = ", …" if len(candidates) > SHOWN_MATCHES else ""
    shown = ", ".join(candidates[:SHOWN_MATCHES]) + more
    fail(f"{text!r} matches {len(candidates)} {kind}s: {shown}; use a longer part of the id", code=BAD_INPUT)
