"""Where a webhook may go: a URL's form, and which addresses its host may have. Knows nothing of deliveries."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx

Resolve = Callable[[str, int], Awaitable[list[str]]]

_UNICAST = ipaddress.ip_network("2000::/3")  # outside it: mapped, translated (64:ff9b::/96), local, multicast
_PLATFORM = ipaddress.ip_address("168.63.129.16")  # public by its number, but inside Azure its own services


class NotAllowed(Exception):
    """Why a webhook may not go there."""


def checked_url(text: str, *, allow_http: bool, allow_private: bool = False) -> httpx.URL:
    """Raises NotAllowed, also for what is no URL. Says nothing yet of what a name resolves to."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise NotAllowed(f"not a URL: {error}") from None
    if url.scheme != "https" and not (allow_http and url.scheme == "http"):
        raise NotAllowed("it must begin with https://")
    if not url.host or url.userinfo or url.fragment:
        raise NotAllowed("it must name a host, and hold neither a user name nor a fragment")
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise NotAllowed("it has no such port")
    with suppress(ValueError):  # a name, in most cases
        if not allow_private and not is_public(url.host):
            raise NotAllowed("its address is not a public one")
    return url


def is_public(text: str) -> bool:
    """Whether an address is one of the internet: not of this machine, its network, its cloud, or one in disguise.

    Raises ValueError for what is no address.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and (
        address not in _UNICAST or address.sixtofour is not None or address.teredo is not None
    ):
        return False  # those hold an IPv4 address, which a router may go on to
    return address.is_global and not address.is_multicast and address != _PLATFORM


async def resolve(host: str, port: int) -> list[str]:
    """Best first. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
