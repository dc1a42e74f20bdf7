"""One form of error: RFC 9457 problem details with a stable `code`. The only place that knows HTTP statuses of errors.

Rooms raise their own exceptions, plain and without HTTP; the table here gives each a status and a code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
    """What a room cannot do, in words for whoever asked. Subclasses stand in ANSWERS; `extra` joins the answer."""

    def __init__(self, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.message = message
        self.extra = extra


class NotFound(ServiceError):
    """No such object, or none that the caller may see."""


class IllegalAction(ServiceError):
    """The object's state does not allow it; `allowed_actions` tells what it does."""


class EncoderInUse(ServiceError):
    """Aliases, deployments or jobs need it; `used_by` names them."""


class AliasMoved(ServiceError):
    """It points to another encoder than the request expects; `current` tells which."""


class BadCursor(ServiceError):
    pass


class KeyReused(ServiceError):
    """An Idempotency-Key that came with another body before."""


class KeyInFlight(ServiceError):
    """The first request with that Idempotency-Key has not ended yet."""


class Unauthenticated(ServiceError):
    pass


class Forbidden(ServiceError):
    """Known, but not allowed: the scope is missing."""


class TooMany(ServiceError):
    """More requests than the limit; `retry_after` in seconds."""


class UriNotAllowed(ServiceError):
    """A data or storage URI outside the configured prefixes; `field` names it."""


class BodyTooLarge(ServiceError):
    pass


class UnsupportedMediaType(ServiceError):
    pass


class ClusterUnavailable(ServiceError):
    """Ray does not answer, and the question needs it."""


class NotDeployed(ServiceError):
    """No deployment answers for that encoder."""


class EncoderUnavailable(ServiceError):
    """Its replicas do not answer now: none runs yet, or one died under the request."""


class Overloaded(ServiceError):
    """The replicas have more queued than they may; `retry_after` in seconds."""


class DeadlinePassed(ServiceError):
    """The request's own deadline."""


class ItemInvalid(ServiceError):
    """A file that cannot be encoded; `index` tells which of the request."""


class NotPossible(ServiceError):
    """Not with this encoder: it has no head, or not so many layers."""


class IssuerUnavailable(ServiceError):
    """The OIDC issuer's keys are needed and cannot be had."""


class Answer(NamedTuple):
    status: HTTPStatus
    code: str
    retryable: bool = False


ANSWERS: dict[type[ServiceError], Answer] = {
    NotFound: Answer(HTTPStatus.NOT_FOUND, "not_found"),
    IllegalAction: Answer(HTTPStatus.CONFLICT, "illegal_action"),
    EncoderInUse: Answer(HTTPStatus.CONFLICT, "encoder_in_use"),
    AliasMoved: Answer(HTTPStatus.CONFLICT, "alias_moved"),
    BadCursor: Answer(HTTPStatus.UNPROCESSABLE_ENTITY, "cursor_invalid"),
    KeyReused: Answer(HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_key_reused"),
    KeyInFlight: Answer(HTTPStatus.CONFLICT, "idempotency_key_in_flight", retryable=True),
    Unauthenticated: Answer(HTTPStatus.UNAUTHORIZED, "unauthenticated"),
    Forbidden: Answer(HTTPStatus.FORBIDDEN, "forbidden"),
    TooMany: Answer(HTTPStatus.TOO_MANY_REQUESTS, "rate_limited", retryable=True),
    UriNotAllowed: Answer(HTTPStatus.UNPROCESSABLE_ENTITY, "uri_not_allowed"),
    BodyTooLarge: Answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large"),
    UnsupportedMediaType: Answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
    ClusterUnavailable: Answer(HTTPStatus.SERVICE_UNAVAILABLE, "cluster_unavailable", retryable=True),
    NotDeployed: Answer(HTTPStatus.CONFLICT, "encoder_not_deployed"),
    EncoderUnavailable: Answer(HTTPStatus.SERVICE_UNAVAILABLE, "encoder_unavailable", retryable=True),
    Overloaded: Answer(HTTPStatus.TOO_MANY_REQUESTS, "overloaded", retryable=True),
    DeadlinePassed: Answer(HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded", retryable=True),
    ItemInvalid: Answer(HTTPStatus.UNPROCESSABLE_ENTITY, "item_invalid"),
    NotPossible: Answer(HTTPStatus.UNPROCESSABLE_ENTITY, "not_possible"),
    IssuerUnavailable: Answer(HTTPStatus.SERVICE_UNAVAILABLE, "issuer_unavailable", retryable=True),
}
# Of the framework itself, by status.
CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class FieldProblem(BaseModel):
    """One thing that is wrong with the request."""

    pointer: str
    """Where, as a JSON pointer into the body (`#/config/mask`) or the name of a parameter."""
    detail: str


class Problem(BaseModel):
    """RFC 9457; `application/problem+json`."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: str
    title: str
    status: int
    detail: str
    code: str
    """Stable; decide by it and not by the text."""
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


def code_of(error: ServiceError) -> str:
    return _answer_of(error).code


def _answer_of(error: ServiceError) -> Answer:
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def answer(request: Request, error: ServiceError) -> JSONResponse:
    """A room's exception as the table has it."""
    found = _answer_of(error)
    headers = {}
    if found.retryable:
        headers["Retry-After"] = str(max(1, round(error.extra.get("retry_after", 1))))
    if found.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(
        request, found.status, found.code, error.message, retryable=found.retryable, headers=headers, **error.extra
    )


def install(app: FastAPI) -> None:
    """Every error of the app in this one form."""

    def of_service(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ServiceError)
        return answer(request, error)

    def of_config(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ConfigError)
        errors = [_located(line) for line in error.problems]
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "config_invalid", str(error), errors=errors)

    def of_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        if any(found["type"] == "json_invalid" for found in error.errors()):
            return problem(request, HTTPStatus.BAD_REQUEST, "json_invalid", "the body is not valid JSON")
        errors = [FieldProblem(pointer=_pointer(found["loc"]), detail=found["msg"]) for found in error.errors()]
        detail = "; ".join(f"{found.pointer}: {found.detail}" for found in errors[:5])
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "request_invalid", detail, errors=errors)

    def of_framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        headers = dict(error.headers or {})
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_methods(request))
        code = CODES.get(status, status.phrase.lower().replace(" ", "_"))
        return problem(request, status, code, str(error.detail), headers=headers)

    def of_database(request: Request, error: Exception) -> JSONResponse:
        logger.error("the database does not answer: %s", error)
        detail = "the database does not answer; nothing was changed, try again"
        headers = {"Retry-After": "2"}
        status = HTTPStatus.SERVICE_UNAVAILABLE
        return problem(request, status, "database_unavailable", detail, retryable=True, headers=headers)

    def of_data(request: Request, error: Exception) -> JSONResponse:
        """What one database takes and another does not: a NUL character in a text."""
        detail = "a value of the request cannot be kept: texts must not hold NUL characters"
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "request_invalid", detail)

    def of_driver(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, DBAPIError)
        return of_database(request, error) if error.connection_invalidated else of_accident(request, error)

    def of_storage(request: Request, error: Exception) -> JSONResponse:
        logger.error("the storage does not answer: %s", error)
        detail = "the storage root cannot be used now; try again"
        status = HTTPStatus.SERVICE_UNAVAILABLE
        return problem(request, status, "storage_unavailable", detail, retryable=True, headers={"Retry-After": "5"})

    def of_accident(request: Request, error: Exception) -> JSONResponse:
        logger.exception("an error nobody foresaw", exc_info=error)
        detail = "an error inside the service; its log tells more under this request id"
        return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, "internal", detail)

    app.add_exception_handler(ServiceError, of_service)
    app.add_exception_handler(ConfigError, of_config)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_framework)
    app.add_exception_handler(OperationalError, of_database)
    app.add_exception_handler(PoolTimeout, of_database)
    app.add_exception_handler(DataError, of_data)
    app.add_exception_handler(DBAPIError, of_driver)
    app.add_exception_handler(StorageError, of_storage)
    app.add_exception_handler(Exception, of_accident)


def _methods(request: Request) -> list[str]:
    """Of all routes of a path; the framework names those of the first alone."""
    found = set[str]()
    for route in request.app.routes:
        match, _ = route.matches({**request.scope, "method": "?"})
        if match != Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


def _pointer(location: Sequence[Any]) -> str:
    """`("body", "labels", "a")` → `#/labels/a`; a parameter keeps its name."""
    where, *rest = location
    return "#/" + "/".join(map(str, rest)) if where == "body" else ".".join(map(str, rest or [where]))


def _located(line: str) -> FieldProblem:
    """`mask.teacher_ratio=0.9 must be below …` → `#/config/mask/teacher_ratio`."""
    field = line.split("=", 1)[0].split(":", 1)[0].strip()
    if field == "preset":
        return FieldProblem(pointer="#/preset", detail=line)
    dotted = field.replace(".", "/") if field and " " not in field else ""
    return FieldProblem(pointer=f"#/config/{dotted}".rstrip("/"), detail=line)
