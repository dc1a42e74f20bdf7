"""Classify host names."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether a host name or address refers to this machine only. Does not resolve names."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
