"""Read S3 objects with obstore, which takes a quarter of the CPU time of s3fs.

obstore's settings are copied from s3fs: s3fs reads the first object of a bucket, and another one every RENEW_S seconds,
and its request determines the endpoint, addressing style, region and credentials of the other reads. s3fs also repeats
every read that fails, so all errors are those of s3fs. It reads everything if obstore is not installed, or if an option
might make the two differ. Used only in decoding processes: after a fork, obstore's requests wait forever.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

RENEW_S = 60.0  # botocore replaces temporary credentials at least 10 minutes before they expire
PAUSE_S = 10.0  # reads with s3fs only, after a read with obstore has failed
MAX_BYTES = 16 << 20  # obstore aborts the process where Python raises MemoryError; larger objects gain nothing from it
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 5, 15  # as in s3fs
_HEADERS = {
    "accept-encoding",
    "amz-sdk-invocation-id",
    "amz-sdk-request",
    "authorization",
    "host",
    "range",
    "user-agent",
    "x-amz-checksum-mode",
    "x-amz-content-sha256",
    "x-amz-date",
    "x-amz-security-token",
}
"""Headers of requests that obstore can repeat."""
_ENCRYPTION_VARIABLES = ("AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_")  # of obstore, which adds their headers to reads
_SIGNATURE = re.compile(r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/\d+/(?P<region>[^/]+)/s3/aws4_request, .*")

logger = logging.getLogger(__name__)


class S3Credentials(NamedTuple):
    """An access key with its secret."""

    access_key: str
    secret_key: str
    token: str | None


class BucketAccess(NamedTuple):
    """Settings with which s3fs reads objects of a bucket."""

    endpoint: str
    """URL of the store; of the bucket if it is part of the host name."""
    is_virtual_hosted: bool
    region: str | None
    """Region in the signature; None if requests are not signed."""
    credentials: S3Credentials | None
    """None if requests are not signed."""


def read_object(fs: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read a file of an fsspec filesystem, or its bytes [start, end). Raises the filesystem's errors."""
    if "s3" not in fs.protocol:
        return bytes(fs.cat_file(path, start=start, end=end))
    bucket = _bucket(fs, path)
    return _read_with_s3fs(fs, path, start, end) if bucket is None else bucket.read(path, start, end)


def _read_with_s3fs(fs: Any, path: str, start: int | None, end: int | None) -> bytes:
    # By default, s3fs asks for the size of a whole file first, which doubles the requests.
    return bytes(fs.cat_file(path, start=start, end=end, max_concurrency=1))


class BucketReader:
    """Reads the objects of a bucket with the settings of an s3fs filesystem. Thread-safe."""

    def __init__(self, fs: Any, bucket: str) -> None:
        self._fs, self._bucket = fs, bucket
        self._lock = threading.Lock()
        self._access: BucketAccess | None = None
        self._store: Any = None  # obstore's client; None while s3fs reads everything
        self._renew_at = 0.0

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read an object, or its bytes [start, end). Raises the errors of s3fs."""
        key = self._fs.split_path(path)[1]
        if not _is_supported(key, start, end):
            return _read_with_s3fs(self._fs, path, start, end)
        if self._claim_renewal():
            with _sent_requests(self._fs) as requests:
                content = _read_with_s3fs(self._fs, path, start, end)
            self._renew(key, requests)
            return content
        if (store := self._store) is not None:
            found = self._read_with_obstore(store, key, start, end)
            if found is not None:
                return found
        return _read_with_s3fs(self._fs, path, start, end)

    def _claim_renewal(self) -> bool:
        """Return whether the caller's read must renew the settings. Other reads keep the old ones until it succeeds."""
        now = time.monotonic()
        with self._lock:
            if now < self._renew_at:
                return False
            self._renew_at = now + PAUSE_S
            return True

    def _renew(self, key: str, requests: list[Any]) -> None:
        try:
            access = bucket_access(self._fs, self._bucket, key, requests[-1]) if requests else None
            with self._lock:
                if access != self._access or self._store is None:
                    self._store = None if access is None else _open_store(self._bucket, access)
                self._access = access
                self._renew_at = time.monotonic() + RENEW_S
        except Exception as error:  # obstore is missing, or rejects a setting
            logger.debug("s3fs reads s3://%s: %s", self._bucket, error)

    def _read_with_obstore(self, store: Any, key: str, start: int | None, end: int | None) -> bytes | None:
        """Return the content, or None if s3fs must read the object."""
        import obstore

        try:
            result = obstore.get(store, key, options={} if start is None else {"range": (start, end)})
            first, stop = result.range
            return bytes(result.bytes()) if stop - first <= MAX_BYTES else None
        except FileNotFoundError:
            return None
        except Exception as error:  # obstore raises its own types
            logger.debug("s3fs reads s3://%s for %g s: %s", self._bucket, PAUSE_S, error)
            with self._lock:
                self._store, self._renew_at = None, time.monotonic() + PAUSE_S
            return None


_process = os.getpid()
_buckets: dict[tuple[int, str], BucketReader] = {}


def _bucket(fs: Any, path: str) -> BucketReader | None:
    """Return the reader of the path's bucket, or None if obstore cannot replace the filesystem."""
    if os.getpid() != _process or not _has_plain_options(fs):
        return None
    name = fs.split_path(path)[0]
    key = (id(fs), name)  # readers keep their filesystems, so the id of another one differs
    if key not in _buckets:
        _buckets.setdefault(key, BucketReader(fs, name))
    return _buckets[key]


def _has_plain_options(fs: Any) -> bool:
    """Return whether s3fs has only options that a request shows. `bucket_access` checks certificates and proxies."""
    from s3fs import S3FileSystem

    return (
        type(fs) is S3FileSystem
        and not (fs.requester_pays or fs.version_aware or fs.s3_additional_kwargs)
        and fs.kwargs.keys() <= {"profile"}
        and fs.client_kwargs.keys() <= {"endpoint_url", "region_name"}
        and fs.config_kwargs.keys() <= {"max_pool_connections", "region_name"}
    )


def _is_supported(key: str, start: int | None, end: int | None) -> bool:
    """Return whether obstore reads the object, or this range of it, exactly as s3fs does."""
    is_whole = start is None and end is None
    if not is_whole and (start is None or end is None or not 0 <= start < end <= start + MAX_BYTES):
        return False
    return key.isprintable() and not {"", ".", ".."} & set(key.split("/"))


_sent: ContextVar[list[Any] | None] = ContextVar("_sent", default=None)


@contextmanager
def _sent_requests(fs: Any) -> Iterator[list[Any]]:
    """Collect the requests for objects that s3fs sends for this thread."""
    fs.s3.meta.events.register("before-send.s3.GetObject", _record_request, unique_id=__name__)
    requests: list[Any] = []
    token = _sent.set(requests)  # fsspec runs the read in a copy of this context
    try:
        yield requests
    finally:
        _sent.reset(token)


def _record_request(request: Any, **_: Any) -> None:
    if (requests := _sent.get()) is not None:
        requests.append(request)


def bucket_access(fs: Any, bucket: str, key: str, request: Any) -> BucketAccess | None:
    """Return the settings with which s3fs sent a request for an object, or None if obstore does not support them."""
    url = urlsplit(request.url)
    if any(name.startswith(_ENCRYPTION_VARIABLES) for name in os.environ):
        return None
    if getproxies().keys() & {"http", "https", "all"}:
        return None
    if url.scheme == "https" and fs.session.get_config_variable("ca_bundle"):
        return None
    headers = {name.lower(): _text(value) for name, value in request.headers.items()}
    if url.query or "@" in url.netloc or headers.keys() - _HEADERS:
        return None
    is_virtual_hosted = url.netloc.startswith(f"{bucket}.") and unquote(url.path) == f"/{key}"
    if not is_virtual_hosted and unquote(url.path) != f"/{bucket}/{key}":
        return None
    endpoint = f"{url.scheme}://{url.netloc}"
    if "authorization" not in headers:
        return BucketAccess(endpoint, is_virtual_hosted, None, None)
    signature, credentials = _SIGNATURE.fullmatch(headers["authorization"]), _credentials(fs)
    if (
        signature is None
        or credentials is None
        or signature["key"] != credentials.access_key
        or headers.get("x-amz-security-token") != credentials.token
    ):
        return None
    return BucketAccess(endpoint, is_virtual_hosted, signature["region"], credentials)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _credentials(fs: Any) -> S3Credentials | None:
    """Return the credentials that s3fs uses now: its own options, or those that botocore found."""
    from fsspec.asyn import sync

    if fs.key and fs.secret:
        return S3Credentials(fs.key, fs.secret, fs.token or None)
    found = sync(fs.loop, fs.session.get_credentials)
    if found is None:
        return None
    frozen = sync(fs.loop, found.get_frozen_credentials)
    return S3Credentials(frozen.access_key, frozen.secret_key, frozen.token or None)


def _open_store(bucket: str, access: BucketAccess) -> Any:
    """Return obstore's client for a bucket. It neither retries nor looks for credentials."""
    from obstore.store import S3Store

    options: dict[str, Any] = {"skip_signature": True}
    if (credentials := access.credentials) is not None:
        options = {
            "skip_signature": False,
            "region": access.region,
            "credential_provider": lambda: {
                "access_key_id": credentials.access_key,
                "secret_access_key": credentials.secret_key,
                "token": credentials.token,
                "expires_at": None,
            },
        }
    return S3Store(
        bucket,
        endpoint=access.endpoint,
        virtual_hosted_style_request=access.is_virtual_hosted,
        request_payer=False,
        s3_express=False,
        unsigned_payload=False,
        client_options={
            "allow_http": access.endpoint.startswith("http://"),
            "default_headers": {"accept-encoding": "identity"},
            "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=_READ_TIMEOUT_S),
            "timeout": timedelta(hours=1),  # for the whole object; a stalled one reaches the read timeout
        },
        retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
        **options,
    )
