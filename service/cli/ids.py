"""Find an ID by its prefix, or by the prefix of its last part, if only one ID matches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from amd.config import ConfigError
from amd.storage import listdir

if TYPE_CHECKING:
    from service.client import ApiError

SHOWN_MATCHES = 5
SIMILAR = 0.7  # minimum similarity (difflib) of a name that is suggested
UNKNOWN_ID_STATUSES = (404, 422)  # 422: `text` does not have the form of an ID


def matching_ids(text: str, ids: Iterable[str]) -> list[str]:
    """Return the ID that equals `text`, or otherwise all IDs that start with `text` or whose last part does."""
    found = [id for id in ids if id.startswith(text) or re.split("[-_]", id)[-1].startswith(text)]
    return [text] if text in found else found


def unique_id(text: str, ids: Iterable[str], kind: str, list_command: str) -> str:
    """Return the only ID that matches. Raises ConfigError if none or several match; the message lists the candidates.

    `kind`: noun for the messages. `list_command`: command that lists the existing IDs.
    """
    found = only_match(text, ids, kind) if text else None
    if found is None:
        raise ConfigError([f"no {kind} {text!r}; `{list_command}` lists the existing {kind}s"])
    return found


def named_id(text: str, names: Mapping[str, str | None], kind: str, error: ApiError) -> str:
    """Return the only ID with the name `text`, or otherwise the only ID that matches. `names` maps IDs to names.

    Raises ConfigError if several IDs have this name or match. `error`: error that says that the service does not know
    `text`; raised with the most similar name if no ID is found.
    """
    if not text:
        raise error
    named = [id for id, name in names.items() if name == text]
    if len(named) > 1:
        raise ConfigError([f"{text}: is the name of {len(named)} {kind}s: {_shown(named)}; use an ID"])
    found = named[0] if named else only_match(text, names, kind)
    if found is None:
        raise with_similar_name(error, text, [known for pair in names.items() for known in pair if known])
    return found


def with_similar_name(error: ApiError, text: str, known: Iterable[str]) -> ApiError:
    """Return the service's error for an unknown name, with the most similar known name if there is one."""
    close = difflib.get_close_matches(text, list(known), n=1, cutoff=SIMILAR)
    if not close:
        return error
    return type(error)(error.problem.model_copy(update={"detail": f"{error.problem.detail}; did you mean {close[0]}?"}))


def stored_id(text: str, folder: str, kind: str) -> str:
    """Return the only matching name in a folder or URL, or `text` itself if there is none.

    Raises ConfigError if several match.
    """
    return only_match(text, listdir(folder), kind) or text


def only_match(text: str, ids: Iterable[str], kind: str) -> str | None:
    """Return the only ID that matches, or None if there is none. Raises ConfigError if several match."""
    found = matching_ids(text, ids)
    if len(found) > 1:
        raise ConfigError([f"{text!r} matches {len(found)} {kind}s: {_shown(found)}; use a longer prefix"])
    return found[0] if found else None


def _shown(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN_MATCHES]) + (", …" if len(ids) > SHOWN_MATCHES else "")
