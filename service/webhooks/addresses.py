"""Rules for webhook targets: the form of a URL and the addresses of its host. Does not send requests."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx

Resolve = Callable[[str, int], Awaitable[list[str]]]

_UNICAST = ipaddress.ip_network("2000::/3")  # excludes mapped, translated (64:ff9b::/96), local and multicast addresses
_PLATFORM = ipaddress.ip_address("168.63.129.16")  # in a public range, but used by Azure's platform services


class AddressNotAllowed(Exception):
    """Raised when a webhook's URL or address is not allowed; the message states the rule."""


def checked_url(text: str, *, allow_http: bool, allow_private: bool = False) -> httpx.URL:
    """Parse a URL without resolving its host. Raises AddressNotAllowed, including for malformed URLs."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise AddressNotAllowed(f"is not a valid URL: {error}") from None
    if url.scheme != "https" and not (allow_http and url.scheme == "http"):
        raise AddressNotAllowed("must start with https://")
    if not url.host or url.userinfo or url.fragment:
        raise AddressNotAllowed("must have a host, but no user name or fragment")
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise AddressNotAllowed("must have a port between 1 and 65535")
    with suppress(ValueError):  # raised for host names, which are checked once resolved
        if not allow_private and not is_public(url.host):
            raise AddressNotAllowed("must have a public address")
    return url


def is_public(text: str) -> bool:
    """Whether an address is public.

    Addresses of this machine, its network or its cloud platform are not public, and neither are IPv6 addresses that
    embed an IPv4 address. Raises ValueError for text that is not an address.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and (
        address not in _UNICAST or address.sixtofour is not None or address.teredo is not None
    ):
        return False  # both embed an IPv4 address to which a router may forward
    return address.is_global and not address.is_multicast and address != _PLATFORM


async def resolve(host: str, port: int) -> list[str]:
    """Resolve a host to its addresses, most preferred first. Raises OSError if it cannot be resolved."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
