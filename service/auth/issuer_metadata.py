"""Fetch JSON documents from an OIDC issuer, and discover its endpoints.

Responses are bounded in size and time, redirects are not followed, and the endpoints of an https issuer must use https.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import httpx

TIMEOUT_S = 5.0  # for connecting and for each read, and then for the whole body
MAX_BYTES = 2**20
MAX_AGE_S = 3600.0  # maximum age of cached metadata
FETCH_ERRORS = (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError, KeyError, RecursionError)
"""Errors of an issuer that is unavailable or sends invalid documents."""


class IssuerMetadata(NamedTuple):
    """What an issuer publishes in its `/.well-known/openid-configuration`."""

    issuer: str
    document: Mapping[str, Any]

    def endpoint(self, name: str) -> str:
        """Return the URL of an endpoint. Raises KeyError if there is none, or ValueError if the URL is not allowed."""
        url = httpx.URL(self.document[name])
        schemes = ("https",) if httpx.URL(self.issuer).scheme == "https" else ("https", "http")
        if url.scheme not in schemes or not url.host:
            raise ValueError(f"{name}={str(url)!r} in its metadata must be an {' or '.join(schemes)} URL")
        return str(url)

    @property
    def accepts_basic(self) -> bool:
        """Whether clients may authenticate with HTTP Basic rather than in the form. Standard: yes, unless excluded."""
        return "client_secret_basic" in self.document.get(
            "token_endpoint_auth_methods_supported", ["client_secret_basic"]
        )


class MetadataCache:
    """Fetches an issuer's metadata, and keeps it for an hour."""

    def __init__(self, issuer: str, clock: Callable[[], float] = time.time) -> None:
        self._issuer, self._clock = issuer, clock
        self._lock = threading.Lock()
        self._found: IssuerMetadata | None = None
        self._fetched_at = float("-inf")

    def get(self, client: httpx.Client) -> IssuerMetadata:
        """Return the metadata; blocks while it is fetched. Raises one of FETCH_ERRORS."""
        with self._lock:
            now = self._clock()
            if self._found is None or now > self._fetched_at + MAX_AGE_S:
                self._found, self._fetched_at = _discovered(client, self._issuer), now
            return self._found


def fetch_json(
    client: httpx.Client, method: str, url: str, *, expected_errors: Collection[int] = (), **options: Any
) -> tuple[int, Any]:
    """Send a request and return the status and the JSON body of the response. Raises one of FETCH_ERRORS.

    `expected_errors`: error statuses whose body is returned.
    """
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}  # compressed data has no bounded size
    body = bytearray()
    with client.stream(method, url, headers=headers, **options) as response:
        if response.status_code not in expected_errors:
            response.raise_for_status()
        deadline = time.monotonic() + TIMEOUT_S
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_BYTES:
                raise ValueError(f"the response from {url} exceeds {MAX_BYTES} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"the response from {url} took more than {TIMEOUT_S:g} s")
    return response.status_code, json.loads(bytes(body))


def _discovered(client: httpx.Client, issuer: str) -> IssuerMetadata:
    _, document = fetch_json(client, "GET", issuer.rstrip("/") + "/.well-known/openid-configuration")
    if document["issuer"] != issuer:
        raise ValueError(f"its metadata is for a different issuer, {document['issuer']!r}")
    return IssuerMetadata(issuer, document)
