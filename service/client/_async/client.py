"""The client: connection settings, method groups, and the methods that belong to no group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from service.auth.session_routes import CallerView, ConsoleLinkView
from service.client._async.deployments import AsyncDeployments
from service.client._async.encoders import AsyncAliases, AsyncEncoders
from service.client._async.jobs import AsyncJobs
from service.client._async.keys import AsyncKeys
from service.client._async.projects import AsyncProjects
from service.client._async.requests import TIMEOUT, AsyncApiMethods
from service.client._async.webhooks import AsyncWebhooks
from service.client.discovery import find_service
from service.client.inference import accepted_media_types, parse_embeddings, parse_items
from service.client.messages import input_item, input_items, parse
from service.client.retries import Patience
from service.jobs.kinds import JobKind
from service.jobs.schemas import JobRequest, ValidateView
from service.lab.schemas import LabView
from service.operations.doctor.findings import Diagnosis
from service.operations.retention.routes import GcReport, GcRequest, RetentionView
from service.serving.requests import DEADLINE_S
from service.serving.schemas import ClassificationView, EmbeddingView, ReconstructionView

GC_DEADLINE_S = 3600.0


class AsyncClient(AsyncApiMethods):
    """Client for a service. Raises ApiError for an error response, and NoAnswer if the service cannot be reached."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: Patience | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        http = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, transport=transport)
        super().__init__(http, patience or Patience())
        self.jobs = AsyncJobs(self._http, self._patience)
        self.keys = AsyncKeys(self._http, self._patience)
        self.webhooks = AsyncWebhooks(self._http, self._patience)
        self.projects = AsyncProjects(self._http, self._patience)
        self.encoders = AsyncEncoders(self._http, self._patience)
        self.aliases = AsyncAliases(self._http, self._patience)
        self.deployments = AsyncDeployments(self._http, self._patience)

    @classmethod
    def from_environment(cls, **options: Any) -> AsyncClient:
        """Connect to AMD_URL with AMD_KEY or AMD_KEY_FILE. Default: the stack that `amd up` started.

        Raises NoAnswer if there is neither.
        """
        return cls(*find_service(), **options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def presets(self) -> list[dict[str, Any]]:
        return await self._request("GET", list[dict[str, Any]], "presets")

    async def preset(self, name: str) -> dict[str, Any]:
        return await self._request("GET", dict[str, Any], "presets", name)

    async def schema(self, kind: JobKind) -> dict[str, Any]:
        """Get the JSON schema of a job kind's config."""
        return await self._request("GET", dict[str, Any], "schemas", kind)

    async def validate(self, request: JobRequest) -> ValidateView:
        """Resolve a request and estimate its cost, without running it."""
        return await self._request("POST", ValidateView, "validate", body=request, repeatable=True)

    async def me(self) -> CallerView:
        """Get the caller: its key, project and scopes."""
        return await self._request("GET", CallerView, "me")

    async def console_link(self) -> ConsoleLinkView:
        """Create a single-use link that opens the web console with the API key's scopes and project."""
        return await self._request("POST", ConsoleLinkView, "console-links")

    async def collect_garbage(self, request: GcRequest, deadline_s: float = GC_DEADLINE_S) -> GcReport:
        """Remove what the retention policy no longer keeps, or report it with `dry_run`.

        Requires an admin key for all projects. The service continues even if the deadline passes.
        """
        return await self._request("POST", GcReport, "gc", body=request, deadline_s=deadline_s)

    async def retention(self, limit: int | None = None) -> RetentionView:
        """Get the retention policy and the latest garbage collections. Requires an admin key for all projects."""
        return await self._request("GET", RetentionView, "gc", query={"limit": limit})

    async def doctor(self) -> Diagnosis:
        """Run all checks of the service and its dependencies. Requires an admin key for all projects."""
        return await self._request("GET", Diagnosis, "doctor")

    async def health(self) -> dict[str, Any]:
        """Get the readiness of each part of the service. Does not raise if a part is not ready."""
        return await self._request("GET", dict[str, Any], path="/readyz", accepted=(503,))

    async def embeddings(
        self, encoder: str, files: Sequence[str | Path | bytes], **options: Any
    ) -> list[EmbeddingView]:
        """Embed images and videos with a deployed encoder, identified by ID, alias or deployment name.

        `files`: local paths and bytes are uploaded; URIs (`s3://…`) are read by the service.
        `options`: fields of the request, such as normalize=True or deadline_s=300. A request that exceeds `deadline_s`
        (in seconds) fails and is not retried.
        """
        body = {**options, "input": input_items(files)}
        headers = {"Accept": accepted_media_types(options)}
        return parse_embeddings(await self._infer(body, "encoders", encoder, "embeddings", headers=headers))

    async def classifications(
        self, encoder: str, files: Sequence[str | Path | bytes], **options: Any
    ) -> list[ClassificationView]:
        """Predict the most likely labels with a deployed fine-tuned encoder. `options`: top_k and deadline_s."""
        body = {**options, "input": input_items(files)}
        return parse_items(ClassificationView, await self._infer(body, "encoders", encoder, "classifications"))

    async def reconstructions(
        self, encoder: str, files: Sequence[str | Path | bytes], **options: Any
    ) -> list[ReconstructionView]:
        """Mask and reconstruct files with a deployed encoder. `options`: mask_ratio, seed and deadline_s."""
        body = {**options, "input": input_items(files)}
        return parse_items(ReconstructionView, await self._infer(body, "encoders", encoder, "reconstructions"))

    async def masks(self, file: str | Path | bytes | None = None, **options: Any) -> LabView:
        """Draw masks in the mask lab for an image or a video, for a sample of a job's data, or without any input.

        `file`: a local path, bytes or a URI. `options`: fields of the request, such as preset="demo-image-amd",
        student_ratio=0.75, job=… with record=0 and checkpoint=…, or deadline_s=300.
        """
        body = options if file is None else {**options, "input": input_item(file)}
        return parse(LabView, (await self._infer(body, "lab", "masks")).content)

    async def _infer(self, body: dict[str, Any], *segments: str, **options: Any) -> httpx.Response:
        """Send a request that the service answers by the deadline in its body. `options` are passed to `_send`."""
        body = {"deadline_s": DEADLINE_S, **body}
        options |= {"body": body, "repeatable": True, "deadline_s": float(body["deadline_s"])}
        return await self._send("POST", *segments, **options)
