"""Methods for API keys: `client.keys`."""

from __future__ import annotations

from service.auth.api_keys import KeyList, KeyRequest, KeyView, NewKeyView
from service.client._async.requests import AsyncApiMethods
from service.client.messages import api_path


class AsyncKeys(AsyncApiMethods):
    async def create(self, request: KeyRequest) -> NewKeyView:
        """Create a key. Only this response contains it.

        Never retried once sent, because a lost response would leave a key that nobody knows.
        """
        return await self._request("POST", api_path("keys"), NewKeyView, body=request.model_dump(mode="json"))

    async def list(self) -> list[KeyView]:
        return (await self._request("GET", api_path("keys"), KeyList)).items

    async def revoke(self, key_id: str) -> None:
        await self._send("DELETE", api_path("keys", key_id))
