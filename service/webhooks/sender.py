"""Sends deliveries, signed as Standard Webhooks says: https://www.standardwebhooks.com.

A receiver is a stranger's machine: its host is resolved once, all its addresses must be public ones, and the
connection goes to the first of them, so that no name can lead it elsewhere in between. Redirects and proxies are not
followed, and nothing of an answer is kept but its status.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence

import httpx
from sqlalchemy import Engine

from service.webhooks.addresses import NotAllowed, Resolve, checked_url, is_public, resolve
from service.webhooks.store import Try, WebhookStore

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0  # of a try, from the look-up of its host to the answer
PAUSE_S = 1.0  # between two steps
WEBHOOKS, EACH = 16, 8  # of a step: its tries are made at once
FORGET_EVERY_S = 3600.0


class Sender:
    """Any number may run side by side: each try is one sender's."""

    def __init__(
        self,
        engine: Engine,
        *,
        allow_http: bool = False,
        allow_private: bool = False,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`allow_private`: for tests, whose receivers are on this machine; no setting and no request turns it on."""
        self._store = WebhookStore(engine)
        self._allow_http, self._allow_private = allow_http, allow_private
        self._resolve, self._clock = resolve, clock
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._forgot_at = float("-inf")
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs, and they may hold a token

    def run(self, stop: threading.Event) -> None:
        """Until told to stop, whatever happens to the database meanwhile."""
        while not stop.is_set():
            try:
                self.step()
            except Exception:
                logger.exception("webhooks: a step failed; the next one goes on")
            stop.wait(PAUSE_S)

    def step(self) -> None:
        """Make all tries that are due, up to a number."""
        now = self._clock()
        tries = self._store.claim(now, WEBHOOKS, EACH)
        if tries:
            asyncio.run(self._send_all(tries))
        if now > self._forgot_at + FORGET_EVERY_S:
            self._forgot_at = now
            self._store.forget(now)

    async def _send_all(self, tries: Sequence[Try]) -> None:
        # Connections are not kept: what is behind one is known by name, and two names may share an address.
        unkept = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=TIMEOUT_S, limits=unkept) as client:
            await asyncio.gather(*(self._send(client, each) for each in tries))

    async def _send(self, client: httpx.AsyncClient, made: Try) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                taken, answer = await self._post(client, made)
        except NotAllowed as error:
            taken, answer = False, str(error)
        except TimeoutError:
            taken, answer = False, f"no answer within {TIMEOUT_S:.0f} s"
        except Exception as error:  # whatever a stranger's machine brings about, the others' deliveries go on
            taken, answer = False, f"not reached: {type(error).__name__}"
        await asyncio.to_thread(self._store.settle, made, taken, answer)

    async def _post(self, client: httpx.AsyncClient, made: Try) -> tuple[bool, str]:
        url = checked_url(made.url, allow_http=self._allow_http, allow_private=self._allow_private)
        host = url.raw_host.decode("ascii")
        addresses = await self._resolve(host, url.port or (443 if url.scheme == "https" else 80))
        if not addresses or not (self._allow_private or all(map(is_public, addresses))):
            raise NotAllowed("its host has no public address, or others besides")
        body = json.dumps(made.body, separators=(",", ":")).encode()
        headers = {"Host": url.netloc.decode("ascii"), "Content-Type": "application/json", "User-Agent": "amd-service"}
        headers |= signed(made.secret, made.message_id, int(self._clock()), body)
        pinned = url.copy_with(host=addresses[0])
        name = {"sni_hostname": host}  # which the certificate must be for
        async with client.stream("POST", pinned, content=body, headers=headers, extensions=name) as response:
            return response.is_success, f"answered {response.status_code}"


def signed(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers by which a receiver knows that a message is ours, whole, and not an old one."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
