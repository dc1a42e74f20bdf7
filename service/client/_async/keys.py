"""Methods for API keys: `client.keys`."""

from __future__ import annotations

from service.auth.api_keys import KeyList, KeyRequest, KeyView, NewKeyView
from service.client._async.requests import AsyncApiMethods


class AsyncKeys(AsyncApiMethods):
    _resource = ("keys",)

    async def create(self, request: KeyRequest) -> NewKeyView:
        """Create a key. Only this response contains it.

        Never retried once sent, because a lost response would leave a key that nobody knows.
        """
        return await self._request("POST", NewKeyView, body=request)

    async def list(self) -> list[KeyView]:
        return (await self._request("GET", KeyList)).items

    async def revoke(self, key_id: str) -> None:
        await self._send("DELETE", key_id)
