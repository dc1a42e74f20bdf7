"""Store attempts to sign in through the OIDC issuer in short-lived cookies, one per attempt.

A cookie binds an attempt to its browser: nobody can make another browser finish it, and thereby sign its user in to a
foreign account (login CSRF). It needs no signature, since a browser can only forge its own attempts, and `__Host-`
prevents other hosts from planting one. A table would let anyone who is not signed in fill the database. As the name
contains the attempt's state, several tabs can sign in at the same time. SameSite=Lax permits the issuer's redirect.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from fastapi import Request
from starlette.responses import Response

from service.auth.code_flow import SignInAttempt
from service.auth.sessions import cookie_name

LIFETIME_S = 600
MAX_ATTEMPTS = 5  # per browser: proxies and servers limit the size of all cookies together
MAX_TARGET = 2000  # characters; browsers reject cookies over 4096 bytes
_STATE = r"[A-Za-z0-9_-]{43}"


class PendingSignIn(NamedTuple):
    """An attempt that this browser started, and the page to open once it succeeds."""

    attempt: SignInAttempt
    target: str


def store(request: Request, response: Response, pending: PendingSignIn) -> None:
    """Store an attempt in the browser, and remove the oldest ones beyond MAX_ATTEMPTS."""
    pattern = re.compile(re.escape(_name(request, "")) + _STATE)
    names = [name for name in request.cookies if pattern.fullmatch(name)]
    for name in names[: max(0, len(names) - MAX_ATTEMPTS + 1)]:
        _delete(request, response, name)
    attempt, target = pending.attempt, quote(pending.target, safe="")
    response.set_cookie(
        _name(request, attempt.state),
        f"{attempt.nonce}.{attempt.verifier}.{target if len(target) <= MAX_TARGET else ''}",
        max_age=LIFETIME_S,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="lax",
    )


def find(request: Request, state: str) -> PendingSignIn | None:
    """Return the attempt with this state if this browser started it and has not finished it."""
    value = request.cookies.get(_name(request, state), "") if re.fullmatch(_STATE, state) else ""
    nonce, _, rest = value.partition(".")
    verifier, separator, target = rest.partition(".")
    return PendingSignIn(SignInAttempt(state, nonce, verifier), unquote(target)) if separator else None


def remove(request: Request, response: Response, pending: PendingSignIn) -> None:
    """Remove an attempt from the browser, so that it can be finished only once."""
    _delete(request, response, _name(request, pending.attempt.state))


def _name(request: Request, state: str) -> str:
    return f"{cookie_name(request.scope, 'sign_in')}_{state}"


def _delete(request: Request, response: Response, name: str) -> None:
    response.delete_cookie(name, path="/", secure=request.url.scheme == "https", httponly=True)
