"""Error responses: RFC 9457 problem details with a stable `code`. The only module with HTTP error statuses.

The service's packages raise ServiceError subclasses, which are independent of HTTP; ERROR_RESPONSES maps each one to a
status and a code. Imports no other package of the service.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import Match

from amd.config import ConfigError
from amd.storage import StorageError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


class ServiceError(Exception):
    """Base of the errors that a request can cause, with a message for the caller.

    Subclasses are listed in ERROR_RESPONSES; `extra` is added to the members of the response.
    """

    def __init__(self, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.message = message
        self.extra = extra


class NotFound(ServiceError):
    """The object does not exist, or is not visible to the caller."""


class IllegalAction(ServiceError):
    """The object's state does not allow the action; `allowed_actions` lists the actions that it allows."""


class EncoderInUse(ServiceError):
    """Aliases, deployments or jobs use the encoder; `used_by` lists them."""


class AliasMoved(ServiceError):
    """The alias points to a different encoder than the request expects; `current` is its id."""


class BadCursor(ServiceError):
    """The cursor of a listing is invalid."""


class KeyReused(ServiceError):
    """The Idempotency-Key was already sent with a different request."""


class KeyInFlight(ServiceError):
    """The first request with this Idempotency-Key has not completed yet."""


class Unauthenticated(ServiceError):
    """The request has no valid key or token."""


class Forbidden(ServiceError):
    """The caller is authenticated but lacks the required scope or project."""


class TooMany(ServiceError):
    """The caller exceeded its rate limit; `retry_after` is in seconds."""


class UriNotAllowed(ServiceError):
    """A URI is not allowed; `field` is the field that contains it."""


class BodyTooLarge(ServiceError):
    """The request's body exceeds the limit."""


class UnsupportedMediaType(ServiceError):
    """The request's body is not JSON."""


class ClusterUnavailable(ServiceError):
    """The request needs Ray, which does not respond."""


class NotDeployed(ServiceError):
    """No deployment serves the encoder."""


class EncoderUnavailable(ServiceError):
    """The encoder's replicas do not respond: none is running yet, or one died during the request."""


class Overloaded(ServiceError):
    """The replicas' queues are full; `retry_after` is in seconds."""


class DeadlinePassed(ServiceError):
    """The request's own deadline has passed."""


class ItemInvalid(ServiceError):
    """A file cannot be encoded; `index` is its position in the request."""


class NotPossible(ServiceError):
    """The encoder does not support the request, for example because it has no head or too few layers."""


class IssuerUnavailable(ServiceError):
    """The OIDC issuer's keys are needed but unavailable."""


class ErrorResponse(NamedTuple):
    """HTTP status and code of an error."""

    status: HTTPStatus
    code: str
    retryable: bool = False


ERROR_RESPONSES: dict[type[ServiceError], ErrorResponse] = {
    NotFound: ErrorResponse(HTTPStatus.NOT_FOUND, "not_found"),
    IllegalAction: ErrorResponse(HTTPStatus.CONFLICT, "illegal_action"),
    EncoderInUse: ErrorResponse(HTTPStatus.CONFLICT, "encoder_in_use"),
    AliasMoved: ErrorResponse(HTTPStatus.CONFLICT, "alias_moved"),
    BadCursor: ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY, "cursor_invalid"),
    KeyReused: ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_key_reused"),
    KeyInFlight: ErrorResponse(HTTPStatus.CONFLICT, "idempotency_key_in_flight", retryable=True),
    Unauthenticated: ErrorResponse(HTTPStatus.UNAUTHORIZED, "unauthenticated"),
    Forbidden: ErrorResponse(HTTPStatus.FORBIDDEN, "forbidden"),
    TooMany: ErrorResponse(HTTPStatus.TOO_MANY_REQUESTS, "rate_limited", retryable=True),
    UriNotAllowed: ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY, "uri_not_allowed"),
    BodyTooLarge: ErrorResponse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large"),
    UnsupportedMediaType: ErrorResponse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
    ClusterUnavailable: ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, "cluster_unavailable", retryable=True),
    NotDeployed: ErrorResponse(HTTPStatus.CONFLICT, "encoder_not_deployed"),
    EncoderUnavailable: ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, "encoder_unavailable", retryable=True),
    Overloaded: ErrorResponse(HTTPStatus.TOO_MANY_REQUESTS, "overloaded", retryable=True),
    DeadlinePassed: ErrorResponse(HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded", retryable=True),
    ItemInvalid: ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY, "item_invalid"),
    NotPossible: ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY, "not_possible"),
    IssuerUnavailable: ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, "issuer_unavailable", retryable=True),
}
# Codes of errors raised by the framework, by status.
FRAMEWORK_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class FieldProblem(BaseModel):
    """One problem of the request."""

    pointer: str
    """Location of the problem: a JSON pointer into the body (`#/config/mask`) or the name of a parameter."""
    detail: str


class Problem(BaseModel):
    """Problem details of an error as in RFC 9457, sent as `application/problem+json`."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: str
    title: str
    status: int
    detail: str
    code: str
    """Stable code that programs can rely on; `detail` may change."""
    request_id: str
    retryable: bool = False
    """Whether the same request may succeed later."""
    errors: list[FieldProblem] = []


def problem(
    request: Request,
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    retryable: bool = False,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
    **extra: Any,
) -> JSONResponse:
    body = Problem(
        type=f"urn:amd:problem:{code}",
        title=status.phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=getattr(request.state, "request_id", ""),
        retryable=retryable,
        errors=list(errors),
        **extra,
    )
    content = body.model_dump(mode="json", exclude_defaults=False)
    return JSONResponse(content, status, dict(headers or {}), media_type=MEDIA_TYPE)


def error_code(error: ServiceError) -> str:
    return _response_of(error).code


def _response_of(error: ServiceError) -> ErrorResponse:
    return next(ERROR_RESPONSES[kind] for kind in type(error).__mro__ if kind in ERROR_RESPONSES)


def error_response(request: Request, error: ServiceError) -> JSONResponse:
    """Return the response to a ServiceError."""
    found = _response_of(error)
    headers = {}
    if found.retryable:
        headers["Retry-After"] = str(max(1, round(error.extra.get("retry_after", 1))))
    if found.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(
        request, found.status, found.code, error.message, retryable=found.retryable, headers=headers, **error.extra
    )


def install(app: FastAPI) -> None:
    """Install handlers that turn every error of the app into problem details."""
    for error, handler in _HANDLERS.items():
        app.add_exception_handler(error, handler)


def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return error_response(request, error)


def _config_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ConfigError)
    errors = [_located(line) for line in error.problems]
    return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "config_invalid", str(error), errors=errors)


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if any(found["type"] == "json_invalid" for found in error.errors()):
        return problem(request, HTTPStatus.BAD_REQUEST, "json_invalid", "the body is not valid JSON")
    errors = [FieldProblem(pointer=_pointer(found["loc"]), detail=found["msg"]) for found in error.errors()]
    detail = "; ".join(f"{found.pointer}: {found.detail}" for found in errors[:5])
    return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "request_invalid", detail, errors=errors)


def _framework_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request))
    code = FRAMEWORK_CODES.get(status, status.phrase.lower().replace(" ", "_"))
    return problem(request, status, code, str(error.detail), headers=headers)


def _database_unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.error("the database does not respond: %s", error)
    detail = "the database does not respond; nothing was changed, try again"
    headers = {"Retry-After": "2"}
    status = HTTPStatus.SERVICE_UNAVAILABLE
    return problem(request, status, "database_unavailable", detail, retryable=True, headers=headers)


def _database_value_error(request: Request, error: Exception) -> JSONResponse:
    """Handle a value that one database accepts and another rejects, such as NUL characters in text."""
    detail = "a value of the request cannot be stored: text must not contain NUL characters; remove them"
    return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "request_invalid", detail)


def _database_driver_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DBAPIError)
    return _database_unavailable(request, error) if error.connection_invalidated else _unhandled_error(request, error)


def _storage_unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.error("the storage does not respond: %s", error)
    detail = "the storage root is temporarily unavailable; try again"
    status = HTTPStatus.SERVICE_UNAVAILABLE
    return problem(request, status, "storage_unavailable", detail, retryable=True, headers={"Retry-After": "5"})


def _unhandled_error(request: Request, error: Exception) -> JSONResponse:
    logger.exception("unhandled error", exc_info=error)
    detail = "internal error; the service's log contains the details under this request id"
    return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, "internal", detail)


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], JSONResponse]] = {
    ServiceError: _service_error,
    ConfigError: _config_error,
    RequestValidationError: _validation_error,
    HTTPException: _framework_error,
    OperationalError: _database_unavailable,
    PoolTimeout: _database_unavailable,
    DataError: _database_value_error,
    DBAPIError: _database_driver_error,
    StorageError: _storage_unavailable,
    Exception: _unhandled_error,
}


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes that match the path; the framework lists only those of the first route."""
    found = set[str]()
    for route in request.app.routes:
        match, _ = route.matches({**request.scope, "method": "?"})
        if match != Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


def _pointer(location: Sequence[Any]) -> str:
    """Convert a location in the body to a JSON pointer, and return the name of a parameter unchanged.

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
