# Generated from service/client/_async/keys.py by `python -m tests.support.blocking_client`; do not edit.
"""Methods for API keys: `client.keys`."""

from __future__ import annotations

from service.auth.api_keys import KeyList, KeyRequest, KeyView, NewKeyView
from service.client._sync.requests import ApiMethods


class Keys(ApiMethods):
    _resource = ("keys",)

    def create(self, request: KeyRequest) -> NewKeyView:
        """Create a key. Only this response contains it.

        Never retried once sent, because a lost response would leave a key that nobody knows.
        """
        return self._request("POST", NewKeyView, body=request)

    def list(self) -> list[KeyView]:
        return (self._request("GET", KeyList)).items

    def revoke(self, key_id: str) -> None:
        self._send("DELETE", key_id)
