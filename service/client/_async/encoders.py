"""Methods for encoders and their aliases: `client.encoders` and `client.aliases`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from service.client._async.requests import AsyncApiMethods
from service.client.messages import ANY, idempotency
from service.jobs.schemas import JobView
from service.registry.schemas import (
    AliasDetail,
    AliasList,
    AliasRequest,
    AliasView,
    CompareView,
    EncoderComparison,
    EncoderDetail,
    EncoderPage,
    EncoderView,
    ImportRequest,
    Objective,
)


class AsyncEncoders(AsyncApiMethods):
    _resource = ("encoders",)

    def list(
        self,
        *,
        objective: Objective | None = None,
        size: str | None = None,
        alias: str | None = None,
        job: str | None = None,
        project: str | None = None,
        page: int = 200,
    ) -> AsyncIterator[EncoderView]:
        """List matching encoders, newest first; pages are fetched as needed."""
        query = {"objective": objective, "size": size, "alias": alias, "job": job, "project": project, "limit": page}
        return self._pages(EncoderPage, query=query)

    async def get(self, name: str, project: str | None = None) -> EncoderDetail:
        """Get an encoder by ID or alias. `project` selects the alias if the key covers all projects."""
        return await self._request("GET", EncoderDetail, name, query={"project": project})

    async def import_(self, request: ImportRequest, key: str | None = None) -> JobView:
        """Start a job that publishes external weights as an encoder.

        `key` is the Idempotency-Key; by default one is generated.
        """
        return await self._request("POST", JobView, body=request, headers=idempotency(key))

    async def delete(self, encoder_id: str) -> None:
        """Delete an encoder and its weights. Fails while it is in use."""
        await self._send("DELETE", encoder_id)

    async def compare(self, name: str, other: str, project: str | None = None) -> CompareView:
        return await self._request("GET", CompareView, name, "compare", other, query={"project": project})

    async def compare_several(self, names: Sequence[str], project: str | None = None) -> EncoderComparison:
        """Compare two to six encoders, named by ID or alias."""
        first, *others = names
        query = {"other": others, "project": project}
        return await self._request("GET", EncoderComparison, first, "compare", query=query)

    async def download(self, name: str, to: str | Path, file: str | None = None, project: str | None = None) -> Path:
        """Download an encoder to the path `to`, atomically: all files as a tar, or only `file`.

        Resumes if the connection drops and the service supports byte ranges.
        """
        return await self._download(Path(to), name, "download", query={"file": file, "project": project})


class AsyncAliases(AsyncApiMethods):
    _resource = ("encoders", "aliases")

    async def list(self, project: str | None = None) -> list[AliasView]:
        return (await self._request("GET", AliasList, query={"project": project})).items

    async def get(self, alias: str, project: str | None = None) -> AliasDetail:
        """Get an alias with its history."""
        return await self._request("GET", AliasDetail, alias, query={"project": project})

    async def move(
        self, alias: str, encoder: str, *, expected: str | None = ANY, project: str | None = None
    ) -> AliasView:
        """Point an alias to an encoder, identified by ID or by another alias.

        `expected` is the encoder that the alias must currently point to, or None if the alias must not exist; if the
        condition does not hold, the call fails with `alias_moved`.
        """
        condition = {} if expected is ANY else {"expected": expected}
        body = AliasRequest(encoder=encoder, project=project, **condition)
        return await self._request("PUT", AliasView, alias, body=body)

    async def delete(self, alias: str, project: str | None = None) -> None:
        """Delete an alias; its history is kept."""
        await self._send("DELETE", alias, query={"project": project})
