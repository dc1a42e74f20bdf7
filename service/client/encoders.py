"""Client calls for encoders and aliases."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from service.client.methods import AsyncMethods, BlockingMethods, async_many, async_one, many, one, pages, present, view
from service.client.transport import Call, Emit, Patience, Script, Steps, download_to, ignore_body, once
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
"""Default of `move(expected=…)`: no condition on the current target."""


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
    """List matching encoders, newest first; pages are fetched as needed."""
    query = present(objective=objective, size=size, alias=alias, job=job, project=project, limit=page)
    return pages("/v1/encoders", EncoderPage, query)


def encoder_get(name: str, project: str | None = None) -> Script[EncoderDetail]:
    """Get an encoder by id or alias. `project` selects the alias if the key covers all projects."""
    return once(Call("GET", _path(name), view(EncoderDetail), present(project=project)))


def encoder_import(request: ImportRequest, key: str | None = None) -> Script[JobView]:
    """Start a job that publishes external weights. `key` is the Idempotency-Key; by default one is generated."""
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    body = request.model_dump(mode="json", exclude_unset=True)
    return once(Call("POST", "/v1/encoders", view(JobView), body=body, headers=headers))


def encoder_delete(encoder_id: str) -> Script[None]:
    """Delete an encoder and its weights. Fails while it is in use."""
    return once(Call("DELETE", _path(encoder_id), ignore_body))


def encoder_compare(name: str, other: str, project: str | None = None) -> Script[CompareView]:
    path = _path(name, f"/compare/{quote(other, safe='')}")
    return once(Call("GET", path, view(CompareView), present(project=project)))


def encoder_download(name: str, to: str | Path, file: str | None = None, project: str | None = None) -> Script[Path]:
    """Download an encoder to the path `to`, atomically: all files as a tar, or only `file`.

    A broken connection is resumed if the service supports byte ranges.
    """
    target = Path(to)

    def steps(patience: Patience) -> Steps[None]:
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with part.open("wb") as written:
                yield from download_to(_path(name, "/download"), present(file=file, project=project), written, patience)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        yield Emit(target)

    return Script(steps)


def alias_list(project: str | None = None) -> Script[list[AliasView]]:
    read: Callable[[httpx.Response], AliasList] = view(AliasList)
    return once(Call("GET", "/v1/encoders/aliases", lambda response: read(response).items, present(project=project)))


def alias_get(alias: str, project: str | None = None) -> Script[AliasDetail]:
    """Get an alias with its history."""
    return once(Call("GET", _alias(alias), view(AliasDetail), present(project=project)))


def alias_move(
    alias: str, encoder: str, *, expected: str | None = ANY, project: str | None = None
) -> Script[AliasView]:
    """Point an alias to an encoder, identified by id or by another alias.

    `expected` is the encoder that the alias must currently point to, or None if the alias must not exist; if the
    condition does not hold, the call fails with `alias_moved`.
    """
    condition = {} if expected is ANY else {"expected": expected}
    body = AliasRequest(encoder=encoder, project=project, **condition).model_dump(mode="json", exclude_unset=True)
    return once(Call("PUT", _alias(alias), view(AliasView), body=body))


def alias_delete(alias: str, project: str | None = None) -> Script[None]:
    """Delete an alias; its history is kept."""
    return once(Call("DELETE", _alias(alias), ignore_body, present(project=project)))


def _alias(name: str) -> str:
    return f"/v1/encoders/aliases/{quote(name, safe='')}"


class Encoders(BlockingMethods):
    list = many(encoder_list)
    get = one(encoder_get)
    import_ = one(encoder_import)
    delete = one(encoder_delete)
    compare = one(encoder_compare)
    download = one(encoder_download)


class AsyncEncoders(AsyncMethods):
    list = async_many(encoder_list)
    get = async_one(encoder_get)
    import_ = async_one(encoder_import)
    delete = async_one(encoder_delete)
    compare = async_one(encoder_compare)
    download = async_one(encoder_download)


class Aliases(BlockingMethods):
    list = one(alias_list)
    get = one(alias_get)
    move = one(alias_move)
    delete = one(alias_delete)


class AsyncAliases(AsyncMethods):
    list = async_one(alias_list)
    get = async_one(alias_get)
    move = async_one(alias_move)
    delete = async_one(alias_delete)
