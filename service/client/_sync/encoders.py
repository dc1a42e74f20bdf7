# Generated from service/client/_async/encoders.py by `python -m tests.support.blocking_client`; do not edit.
"""Methods for encoders and their aliases: `client.encoders` and `client.aliases`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from service.client._sync.requests import ApiMethods
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


class Encoders(ApiMethods):
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
    ) -> Iterator[EncoderView]:
        """List matching encoders, newest first; pages are fetched as needed."""
        query = {"objective": objective, "size": size, "alias": alias, "job": job, "project": project, "limit": page}
        return self._pages(EncoderPage, query=query)

    def get(self, name: str, project: str | None = None) -> EncoderDetail:
        """Get an encoder by ID or alias. `project` selects the alias if the key covers all projects."""
        return self._request("GET", EncoderDetail, name, query={"project": project})

    def import_(self, request: ImportRequest, key: str | None = None) -> JobView:
        """Start a job that publishes external weights as an encoder.

        `key` is the Idempotency-Key; by default one is generated.
        """
        return self._request("POST", JobView, body=request, headers=idempotency(key))

    def delete(self, encoder_id: str) -> None:
        """Delete an encoder and its weights. Fails while it is in use."""
        self._send("DELETE", encoder_id)

    def compare(self, name: str, other: str, project: str | None = None) -> CompareView:
        return self._request("GET", CompareView, name, "compare", other, query={"project": project})

    def compare_several(self, names: Sequence[str], project: str | None = None) -> EncoderComparison:
        """Compare two to six encoders, named by ID or alias."""
        first, *others = names
        query = {"other": others, "project": project}
        return self._request("GET", EncoderComparison, first, "compare", query=query)

    def download(self, name: str, to: str | Path, file: str | None = None, project: str | None = None) -> Path:
        """Download an encoder to the path `to`, atomically: all files as a tar, or only `file`.

        Resumes if the connection drops and the service supports byte ranges.
        """
        return self._download(Path(to), name, "download", query={"file": file, "project": project})


class Aliases(ApiMethods):
    _resource = ("encoders", "aliases")

    def list(self, project: str | None = None) -> list[AliasView]:
        return (self._request("GET", AliasList, query={"project": project})).items

    def get(self, alias: str, project: str | None = None) -> AliasDetail:
        """Get an alias with its history."""
        return self._request("GET", AliasDetail, alias, query={"project": project})

    def move(self, alias: str, encoder: str, *, expected: str | None = ANY, project: str | None = None) -> AliasView:
        """Point an alias to an encoder, identified by ID or by another alias.

        `expected` is the encoder that the alias must currently point to, or None if the alias must not exist; if the
        condition does not hold, the call fails with `alias_moved`.
        """
        condition = {} if expected is ANY else {"expected": expected}
        body = AliasRequest(encoder=encoder, project=project, **condition)
        return self._request("PUT", AliasView, alias, body=body)

    def delete(self, alias: str, project: str | None = None) -> None:
        """Delete an alias; its history is kept."""
        self._send("DELETE", alias, query={"project": project})
