"""Encoders and aliases as a client asks for them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from service.client.methods import Awaiting, Blocking, given, many, many_later, one, one_later, pages, view
from service.client.transport import Call, Emit, Patience, Script, Steps, fetch, nothing, once
from service.jobs.schemas import JobView
from service.registry.schemas import (
    AliasDetail,
    AliasList,
    AliasRequest,
    AliasView,
    CompareView,
    EncoderDetail,
    EncoderPage,
    EncoderView,
    ImportRequest,
    Objective,
)

ANY: Any = object()
"""Of `move`: wherever the alias points now."""


def _path(name: str, rest: str = "") -> str:
    return f"/v1/encoders/{quote(name, safe='')}{rest}"


def encoder_list(
    *,
    objective: Objective | None = None,
    size: str | None = None,
    alias: str | None = None,
    job: str | None = None,
    project: str | None = None,
    page: int = 200,
) -> Script[EncoderView]:
    """All encoders that fit, newest first; pages are fetched as they are needed."""
    query = given(objective=objective, size=size, alias=alias, job=job, project=project, limit=page)
    return pages("/v1/encoders", EncoderPage, query)


def encoder_get(name: str, project: str | None = None) -> Script[EncoderDetail]:
    """By id or alias. `project`: of the alias, for a key of all projects."""
    return once(Call("GET", _path(name), view(EncoderDetail), given(project=project)))


def encoder_import(request: ImportRequest, key: str | None = None) -> Script[JobView]:
    """The job that publishes weights from outside. `key`: the Idempotency-Key; one is made where none is given."""
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    body = request.model_dump(mode="json", exclude_unset=True)
    return once(Call("POST", "/v1/encoders", view(JobView), body=body, headers=headers))


def encoder_delete(encoder_id: str) -> Script[None]:
    """For good, with its weights; refused while something uses it."""
    return once(Call("DELETE", _path(encoder_id), nothing))


def encoder_compare(name: str, other: str, project: str | None = None) -> Script[CompareView]:
    path = _path(name, f"/compare/{quote(other, safe='')}")
    return once(Call("GET", path, view(CompareView), given(project=project)))


def encoder_download(name: str, to: str | Path, file: str | None = None, project: str | None = None) -> Script[Path]:
    """Write an encoder to the file `to`, which is there whole or not at all: a tar, or with `file` one of its files.

    A broken connection is taken up where it broke, where the service can send parts.
    """
    target = Path(to)

    def steps(patience: Patience) -> Steps[None]:
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with part.open("wb") as written:
                yield from fetch(_path(name, "/download"), given(file=file, project=project), written, patience)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        yield Emit(target)

    return Script(steps)


def alias_list(project: str | None = None) -> Script[list[AliasView]]:
    whole: Callable[[httpx.Response], AliasList] = view(AliasList)
    return once(Call("GET", "/v1/encoders/aliases", lambda answer: whole(answer).items, given(project=project)))


def alias_get(alias: str, project: str | None = None) -> Script[AliasDetail]:
    """With its history."""
    return once(Call("GET", _alias(alias), view(AliasDetail), given(project=project)))


def alias_move(
    alias: str, encoder: str, *, expected: str | None = ANY, project: str | None = None
) -> Script[AliasView]:
    """Point an alias to an encoder, or to the one of another alias.

    `expected`: only where it points to this encoder now, None: only where it does not exist yet; otherwise the answer
    is the error `alias_moved`.
    """
    words = {} if expected is ANY else {"expected": expected}
    body = AliasRequest(encoder=encoder, project=project, **words).model_dump(mode="json", exclude_unset=True)
    return once(Call("PUT", _alias(alias), view(AliasView), body=body))


def alias_delete(alias: str, project: str | None = None) -> Script[None]:
    """Take an alias away; its history stays."""
    return once(Call("DELETE", _alias(alias), nothing, given(project=project)))


def _alias(name: str) -> str:
    return f"/v1/encoders/aliases/{quote(name, safe='')}"


class Encoders(Blocking):
    list = many(encoder_list)
    get = one(encoder_get)
    import_ = one(encoder_import)
    delete = one(encoder_delete)
    compare = one(encoder_compare)
    download = one(encoder_download)


class AsyncEncoders(Awaiting):
    list = many_later(encoder_list)
    get = one_later(encoder_get)
    import_ = one_later(encoder_import)
    delete = one_later(encoder_delete)
    compare = one_later(encoder_compare)
    download = one_later(encoder_download)


class Aliases(Blocking):
    list = one(alias_list)
    get = one(alias_get)
    move = one(alias_move)
    delete = one(alias_delete)


class AsyncAliases(Awaiting):
    list = one_later(alias_list)
    get = one_later(alias_get)
    move = one_later(alias_move)
    delete = one_later(alias_delete)
