"""Client calls for API keys."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import httpx

from service.auth.api_keys import KeyList, KeyRequest, KeyView, NewKeyView
from service.client.methods import AsyncMethods, BlockingMethods, async_one, one, view
from service.client.transport import Call, Script, ignore_body, once


def key_create(request: KeyRequest) -> Script[NewKeyView]:
    """Create a key, which only this response contains. Never retried: a lost response would leave an unknown key."""
    return once(Call("POST", "/v1/keys", view(NewKeyView), body=request.model_dump(mode="json")))


def key_list() -> Script[list[KeyView]]:
    read: Callable[[httpx.Response], KeyList] = view(KeyList)
    return once(Call("GET", "/v1/keys", lambda response: read(response).items))


def key_revoke(key_id: str) -> Script[None]:
    return once(Call("DELETE", f"/v1/keys/{quote(key_id, safe='')}", ignore_body))


class Keys(BlockingMethods):
    create = one(key_create)
    list = one(key_list)
    revoke = one(key_revoke)


class AsyncKeys(AsyncMethods):
    create = async_one(key_create)
    list = async_one(key_list)
    revoke = async_one(key_revoke)
