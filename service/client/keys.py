"""API keys as a client asks for them."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import httpx

from service.auth.api_keys import KeyList, KeyRequest, KeyView, NewKeyView
from service.client.methods import Awaiting, Blocking, one, one_later, view
from service.client.transport import Call, Script, nothing, once


def key_create(request: KeyRequest) -> Script[NewKeyView]:
    """The one answer that holds the key itself. Never sent twice: a lost answer would leave a key that nobody knows."""
    return once(Call("POST", "/v1/keys", view(NewKeyView), body=request.model_dump(mode="json")))


def key_list() -> Script[list[KeyView]]:
    whole: Callable[[httpx.Response], KeyList] = view(KeyList)
    return once(Call("GET", "/v1/keys", lambda answer: whole(answer).items))


def key_revoke(key_id: str) -> Script[None]:
    return once(Call("DELETE", f"/v1/keys/{quote(key_id, safe='')}", nothing))


class Keys(Blocking):
    create = one(key_create)
    list = one(key_list)
    revoke = one(key_revoke)


class AsyncKeys(Awaiting):
    create = one_later(key_create)
    list = one_later(key_list)
    revoke = one_later(key_revoke)
