"""Send deliveries, signed according to Standard Webhooks: https://www.standardwebhooks.com.

Receivers are untrusted: the host is resolved once, all its addresses must be public, and the connection goes to the
first of them, so that a DNS change after the check cannot redirect it. Redirects are not followed, proxies are not
used, and only the status of a response is kept.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from itertools import groupby

import httpx
from sqlalchemy import Engine
from standardwebhooks import Webhook

from service.background import StepMonitor
from service.webhooks.addresses import AddressNotAllowed, Resolve, checked_url, is_public, resolve
from service.webhooks.store import DeliveryAttempt, WebhookStore

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0  # per attempt, from resolving the host to the response
PAUSE_S = 1.0  # between steps
MAX_WEBHOOKS, MAX_ATTEMPTS_EACH = 16, 8  # claimed per step; attempts are sent concurrently
MAX_BUSY = 256  # webhooks with attempts in progress
DRAIN_S = 3.0  # how long attempts in progress may take after a stop signal
PURGE_EVERY_S = 3600.0
DAY_S = 86_400.0


class WebhookSender:
    """Sends due deliveries. Any number of senders may run concurrently: each attempt is claimed by only one sender."""

    def __init__(
        self,
        engine: Engine,
        *,
        allow_http: bool = False,
        allow_private: bool = False,
        retain_days: float | None = 7.0,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`retain_days`: days for which finished deliveries are kept; None: forever.

        `allow_private` is for tests with receivers on this machine; no setting or request enables it.
        """
        self._store = WebhookStore(engine)
        self._allow_http, self._allow_private = allow_http, allow_private
        self._retain_days = retain_days
        self._resolve, self._clock = resolve, clock
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._purged_at = float("-inf")
        self.monitor = StepMonitor("webhooks")
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs complete URLs, which may contain a token

    def run(self, stop: threading.Event) -> None:
        """Send deliveries until `stop` is set. Any error is logged, and the next step retries."""
        asyncio.run(self._run(stop))

    async def _run(self, stop: threading.Event) -> None:
        """Send each webhook's attempts in a separate task, so that a slow receiver delays only its own deliveries."""
        sending = dict[str, asyncio.Task[None]]()
        async with self._client() as client:
            while not stop.is_set():
                try:
                    with self.monitor.step():
                        sending = {webhook: task for webhook, task in sending.items() if not task.done()}
                        for webhook, attempts in await asyncio.to_thread(self._claim, tuple(sending)):
                            sending[webhook] = asyncio.create_task(self._send_all(client, attempts))
                except Exception:
                    logger.exception("webhook step failed; will retry")
                await asyncio.sleep(PAUSE_S)
            if sending:
                await asyncio.wait(sending.values(), timeout=DRAIN_S)

    def step(self) -> None:
        """Send the attempts that are due, up to a limit, and wait for their results."""

        async def send() -> None:
            async with self._client() as client:
                await asyncio.gather(*(self._send_all(client, attempts) for _, attempts in claimed))

        if claimed := self._claim(()):
            asyncio.run(send())

    def _claim(self, busy: Collection[str]) -> list[tuple[str, list[DeliveryAttempt]]]:
        """Claim attempts for webhooks that are not busy, grouped by webhook. Occasionally deletes old deliveries."""
        now = self._clock()
        attempts = self._store.claim(now, min(MAX_WEBHOOKS, MAX_BUSY - len(busy)), MAX_ATTEMPTS_EACH, busy)
        if self._retain_days is not None and now > self._purged_at + PURGE_EVERY_S:
            self._purged_at = now
            self._store.purge(now - self._retain_days * DAY_S)
        return [(webhook, list(own)) for webhook, own in groupby(attempts, lambda attempt: attempt.webhook)]

    def _client(self) -> httpx.AsyncClient:
        # Connections are not reused: they are keyed by address, which two host names may share.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=TIMEOUT_S, limits=limits)

    async def _send_all(self, client: httpx.AsyncClient, attempts: Sequence[DeliveryAttempt]) -> None:
        await asyncio.gather(*(self._send(client, attempt) for attempt in attempts))

    async def _send(self, client: httpx.AsyncClient, attempt: DeliveryAttempt) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                accepted, answer = await self._post(client, attempt)
        except AddressNotAllowed as error:
            accepted, answer = False, f"url: {error}"
        except TimeoutError:
            accepted, answer = False, f"no response within {TIMEOUT_S:.0f} s"
        except Exception as error:  # an error from one receiver must not affect other deliveries
            accepted, answer = False, f"could not be reached: {type(error).__name__}"
        await asyncio.to_thread(self._store.record_result, attempt, accepted, answer)

    async def _post(self, client: httpx.AsyncClient, attempt: DeliveryAttempt) -> tuple[bool, str]:
        url = checked_url(attempt.url, allow_http=self._allow_http, allow_private=self._allow_private)
        host = url.raw_host.decode("ascii")
        addresses = await self._resolve(host, url.port or (443 if url.scheme == "https" else 80))
        if not addresses or not (self._allow_private or all(map(is_public, addresses))):
            raise AddressNotAllowed("must have a host with only public addresses")
        body = json.dumps(attempt.body, separators=(",", ":")).encode()
        headers = {"Host": url.netloc.decode("ascii"), "Content-Type": "application/json", "User-Agent": "amd-service"}
        headers |= signature_headers(attempt.secret, attempt.message_id, int(self._clock()), body)
        pinned = url.copy_with(host=addresses[0])
        name = {"sni_hostname": host}  # the name that the certificate must match
        async with client.stream("POST", pinned, content=body, headers=headers, extensions=name) as response:
            return response.is_success, f"responded with {response.status_code}"


def signature_headers(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the three headers with which a receiver verifies the origin, integrity and age of a message."""
    signature = Webhook(secret).sign(message_id, datetime.fromtimestamp(timestamp, UTC), body.decode())
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}
