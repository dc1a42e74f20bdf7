"""Exception handlers that turn every error into problem details, as defined in RFC 9457."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from amd.config import ConfigError, broken_rule
from amd.storage import StorageError
from service.web.errors import (
    CLIENT_CLOSED_REQUEST,
    ERROR_RESPONSES,
    FRAMEWORK_CODES,
    MEDIA_TYPE,
    ErrorResponse,
    FieldProblem,
    Problem,
    ServiceError,
)

logger = logging.getLogger(__name__)

_OTHER_SCHEMA = ("42P01", "42703")  # PostgreSQL: undefined table, undefined column
MAX_FIELD_PROBLEMS = 100
"""Maximum number of problems that a response lists."""


def install(app: FastAPI) -> None:
    """Install the handlers."""
    for error, handler in _HANDLERS.items():
        app.add_exception_handler(error, handler)


def error_response(request: Request, error: Exception) -> Response:
    """Return the response for any error. For middleware, whose errors do not reach the app's handlers."""
    handle = next(_HANDLERS[kind] for kind in type(error).__mro__ if kind in _HANDLERS)
    return handle(request, error)


def _problem(
    code: str,
    detail: str,
    response: ErrorResponse | None = None,
    *,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
    **extra: Any,
) -> JSONResponse:
    """Return the response for an error. `response` is required for codes that are not in ERROR_RESPONSES."""
    status, retry_after_s = response or ERROR_RESPONSES[code]
    body = Problem(
        type=f"urn:amd:problem:{code}",
        title=status.phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=correlation_id.get() or "",
        retryable=retry_after_s is not None,
        errors=list(errors),
        **extra,
    )
    headers = dict(headers or {})
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(extra.get("retry_after", retry_after_s))))
    return JSONResponse(body.model_dump(mode="json"), status, headers, media_type=MEDIA_TYPE)


def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    unauthorized = ERROR_RESPONSES[error.code].status == HTTPStatus.UNAUTHORIZED
    headers = {"WWW-Authenticate": "Bearer"} if unauthorized else {}
    return _problem(error.code, error.message, headers=headers, **error.extra)


def _config_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ConfigError)
    errors = [_located(line) for line in error.problems]
    return _problem("config_invalid", str(error), errors=errors)


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if any(found["type"] == "json_invalid" for found in error.errors()):
        return _problem("json_invalid", "the body is not valid JSON")
    found_errors = error.errors()[:MAX_FIELD_PROBLEMS]
    errors = [FieldProblem(pointer=_pointer(found["loc"]), detail=broken_rule(found)) for found in found_errors]
    detail = "; ".join(f"{found.pointer}: {found.detail}" for found in errors[:5])
    return _problem("request_invalid", detail, errors=errors)


def _framework_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request))
    code = FRAMEWORK_CODES.get(status, status.phrase.lower().replace(" ", "_"))
    return _problem(code, str(error.detail), ErrorResponse(status), headers=headers)


def _database_unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.error("the database does not respond: %s", error)
    return _problem("database_unavailable", "the database does not respond; nothing was changed, try again")


def _database_value_error(request: Request, error: Exception) -> JSONResponse:
    """Handle a value that one database accepts and another rejects, such as text with NUL characters."""
    detail = "a value in the request cannot be stored: text must not contain NUL characters; remove them"
    return _problem("request_invalid", detail)


def _database_driver_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DBAPIError)
    if getattr(error.orig, "sqlstate", None) in _OTHER_SCHEMA:
        logger.error("the database schema does not match this version: %s", error.orig)
        return _problem("database_unavailable", "the database is being migrated; nothing was changed, try again")
    return _database_unavailable(request, error) if error.connection_invalidated else _unhandled_error(request, error)


def _storage_unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.error("the storage does not respond: %s", error)
    return _problem("storage_unavailable", "the storage root is temporarily unavailable; try again")


def _client_disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _unhandled_error(request: Request, error: Exception) -> JSONResponse:
    logger.exception("unhandled error", exc_info=error)
    detail = "internal error; the service's log contains the details under this request id"
    return _problem("internal", detail)


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Response]] = {
    ServiceError: _service_error,
    ConfigError: _config_error,
    RequestValidationError: _validation_error,
    HTTPException: _framework_error,
    OperationalError: _database_unavailable,
    PoolTimeout: _database_unavailable,
    DataError: _database_value_error,
    DBAPIError: _database_driver_error,
    StorageError: _storage_unavailable,
    ClientDisconnect: _client_disconnected,
    Exception: _unhandled_error,
}


def _methods(request: Request) -> list[str]:
    """Return the HTTP methods of all routes that match the path; the framework considers only the first match."""
    found = set[str]()
    for route in request.app.routes:
        match, _ = route.matches({**request.scope, "method": "?"})
        if match != Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


def _pointer(location: Sequence[Any]) -> str:
    """Convert a location in the body to a JSON pointer; parameter names are returned unchanged.

    `("body", "labels", "a")` → `#/labels/a`
    """
    where, *rest = location
    return "#/" + "/".join(map(str, rest)) if where == "body" else ".".join(map(str, rest or [where]))


def _located(line: str) -> FieldProblem:
    """Convert a line of a ConfigError to a problem with a JSON pointer.

    `mask.teacher_ratio=0.9 must be below …` → `#/config/mask/teacher_ratio`
    """
    field = line.split("=", 1)[0].split(":", 1)[0].strip()
    if field == "preset":
        return FieldProblem(pointer="#/preset", detail=line)
    dotted = field.replace(".", "/") if field and " " not in field else ""
    return FieldProblem(pointer=f"#/config/{dotted}".rstrip("/"), detail=line)
