"""Request errors, with their HTTP statuses and stable codes. The only module that contains HTTP error statuses.

The service's packages raise ServiceError subclasses, which are independent of HTTP; ERROR_RESPONSES maps each error's
code to a status. `error_handlers` sends the responses. Imports neither FastAPI nor other packages of the service,
because replicas also raise these errors.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

MEDIA_TYPE = "application/problem+json"


class ServiceError(Exception):
    """Base class for errors that a request can cause, with a message for the caller.

    `extra` contains additional members for the response.
    """

    code: str
    """Stable code, a key of ERROR_RESPONSES."""

    def __init_subclass__(cls, code: str = "") -> None:
        cls.code = code

    def __init__(self, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.message = message
        self.extra = extra


class NotFound(ServiceError, code="not_found"):
    """The object does not exist, or is not visible to the caller."""


class IllegalAction(ServiceError, code="illegal_action"):
    """The object's state does not allow the action; `allowed_actions` lists the actions that it allows."""


class EncoderInUse(ServiceError, code="encoder_in_use"):
    """Aliases, deployments or jobs use the encoder; `used_by` lists them."""


class InfeasibleDeployment(ServiceError, code="infeasible_resources"):
    """The replicas do not fit in the cluster; `needed`, `reserved` and `total` are amounts of `field`."""


class QuotaExceeded(ServiceError, code="quota_exceeded"):
    """The request exceeds a quota of its project; `limit` is the quota's limit, and `field` is the request field."""


class AliasMoved(ServiceError, code="alias_moved"):
    """The alias points to a different encoder than the request expects; `current` is the ID of that encoder."""


class PreconditionFailed(ServiceError, code="precondition_failed"):
    """The object does not match the request's `If-Match`; `current` is the object's ETag."""


class CollectionRunning(ServiceError, code="collection_running"):
    """Another garbage collection is running, in this or another control plane."""


class BadCursor(ServiceError, code="cursor_invalid"):
    """The pagination cursor is invalid."""


class KeyReused(ServiceError, code="idempotency_key_reused"):
    """The Idempotency-Key has already been used for a different request."""


class KeyInFlight(ServiceError, code="idempotency_key_in_flight"):
    """The first request with this Idempotency-Key has not completed yet."""


class Unauthenticated(ServiceError, code="unauthenticated"):
    """The request has no valid key or token."""


class Forbidden(ServiceError, code="forbidden"):
    """The caller is authenticated but lacks the required scope or access to the project."""


class TooMany(ServiceError, code="rate_limited"):
    """The caller exceeded a limit on the rate or number of its requests; `retry_after` is in seconds."""


class UriNotAllowed(ServiceError, code="uri_not_allowed"):
    """A URI is not allowed; `field` is the field that contains it."""


class BodyTooLarge(ServiceError, code="body_too_large"):
    """The request body exceeds the limit."""


class BodyTimeout(ServiceError, code="body_timeout"):
    """The request body did not arrive in time."""


class UnsupportedMediaType(ServiceError, code="unsupported_media_type"):
    """The media type of the request body is not supported."""


class ClusterUnavailable(ServiceError, code="cluster_unavailable"):
    """The request needs Ray, which is not responding."""


class ClusterNotResponding(ClusterUnavailable, code="cluster_unavailable"):
    """Ray cannot be reached or does not answer, so further requests to it would also fail."""


class StorageUnavailable(ServiceError, code="storage_unavailable"):
    """The request needs the storage root, which is not responding."""


class IssuerUnavailable(ServiceError, code="issuer_unavailable"):
    """The request needs the OIDC issuer, which is not responding."""


RefusalCode = Literal[
    "deadline_exceeded",
    "encoder_not_deployed",
    "encoder_unavailable",
    "input_unavailable",
    "item_invalid",
    "lab_unavailable",
    "not_possible",
    "overloaded",
]


class Refusal(ServiceError):
    """The request cannot be served now, or its encoder cannot serve it. Raised by replicas and by the control plane.

    `index` is the position of the item that cannot be encoded or read, and `reason` says why, without the position.
    `retry_after` is the number of seconds until the queue is processed.
    """

    def __init__(
        self,
        code: RefusalCode,
        message: str,
        index: int | None = None,
        retry_after: float | None = None,
        reason: str | None = None,
    ) -> None:
        extra = {"index": index, "reason": reason, "retry_after": retry_after}
        super().__init__(message, **{name: value for name, value in extra.items() if value is not None})
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, because the exception may be sent to another process."""
        extra = (self.extra.get(name) for name in ("index", "retry_after", "reason"))
        return Refusal, (self.code, self.message, *extra)


def invalid_item(index: int, reason: str) -> Refusal:
    """Return the refusal of an item that cannot be encoded."""
    return Refusal("item_invalid", f"input {index}: {reason}", index, reason=reason)


class ErrorResponse(NamedTuple):
    """HTTP response for an error code."""

    status: HTTPStatus
    retry_after_s: int | None = None
    """Default Retry-After in seconds; None if retrying the request does not help."""


ERROR_RESPONSES: dict[str, ErrorResponse] = {
    "not_found": ErrorResponse(HTTPStatus.NOT_FOUND),
    "illegal_action": ErrorResponse(HTTPStatus.CONFLICT),
    "encoder_in_use": ErrorResponse(HTTPStatus.CONFLICT),
    "infeasible_resources": ErrorResponse(HTTPStatus.CONFLICT),
    "quota_exceeded": ErrorResponse(HTTPStatus.CONFLICT),
    "alias_moved": ErrorResponse(HTTPStatus.CONFLICT),
    "precondition_failed": ErrorResponse(HTTPStatus.PRECONDITION_FAILED),
    "collection_running": ErrorResponse(HTTPStatus.CONFLICT, retry_after_s=30),
    "cursor_invalid": ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY),
    "idempotency_key_reused": ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY),
    "idempotency_key_in_flight": ErrorResponse(HTTPStatus.CONFLICT, retry_after_s=1),
    "unauthenticated": ErrorResponse(HTTPStatus.UNAUTHORIZED),
    "forbidden": ErrorResponse(HTTPStatus.FORBIDDEN),
    "rate_limited": ErrorResponse(HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=1),
    "uri_not_allowed": ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY),
    "body_too_large": ErrorResponse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    "body_timeout": ErrorResponse(HTTPStatus.REQUEST_TIMEOUT, retry_after_s=1),
    "unsupported_media_type": ErrorResponse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
    "cluster_unavailable": ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=1),
    "encoder_not_deployed": ErrorResponse(HTTPStatus.CONFLICT),
    "encoder_unavailable": ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=1),
    "lab_unavailable": ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=5),
    "overloaded": ErrorResponse(HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=1),
    "deadline_exceeded": ErrorResponse(HTTPStatus.GATEWAY_TIMEOUT, retry_after_s=1),
    "input_unavailable": ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=5),
    "item_invalid": ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY),
    "not_possible": ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY),
    "issuer_unavailable": ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=1),
    # Errors from other libraries and packages, handled in `error_handlers`.
    "config_invalid": ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY),
    "request_invalid": ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY),
    "json_invalid": ErrorResponse(HTTPStatus.BAD_REQUEST),
    "database_unavailable": ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=2),
    "storage_unavailable": ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=5),
    "internal": ErrorResponse(HTTPStatus.INTERNAL_SERVER_ERROR),
}
CLIENT_CLOSED_REQUEST = 499
"""Status, as in nginx, of a request whose caller disconnected before the response. It is logged but never received."""
# Codes of errors raised by the framework, by status.
FRAMEWORK_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class FieldProblem(BaseModel):
    """One problem with the request."""

    pointer: str
    """Location of the problem: a JSON pointer into the body (`#/config/mask`) or the name of a parameter."""
    detail: str


class Problem(BaseModel):
    """Problem details for an error, as defined in RFC 9457, sent as `application/problem+json`."""

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
