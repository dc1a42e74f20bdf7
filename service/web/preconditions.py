"""Conditional changes: compare `If-Match` with the ETag of the object to be changed, as in RFC 9110."""

from __future__ import annotations

from service.web.errors import PreconditionFailed


def check_match(if_match: str | None, tag: str | None) -> None:
    """Raise PreconditionFailed unless `If-Match` is absent or matches the object's ETag.

    `tag` is None if the object does not exist. Weak tags never match.
    """
    if if_match is None:
        return
    if tag is None:
        raise PreconditionFailed(f"If-Match: {if_match}: the object does not exist; omit the header to create it")
    if not {"*", tag} & {part.strip() for part in if_match.split(",")}:
        message = f"If-Match: {if_match}: the object has changed, and its ETag is {tag}; get it and repeat your change"
        raise PreconditionFailed(message, current=tag)
