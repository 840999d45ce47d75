"""Errors of the queue as HTTP answers in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from typing import Any

from l4queue.errors import (
    IdempotencyConflict,
    InvalidRequest,
    L4QueueError,
    QueueFull,
    RequestCancelled,
    RequestExpired,
    RequestFailed,
    RequestTooLong,
    ServiceUnavailable,
    UnknownRequest,
)

__all__ = ("HttpRefusal", "HttpRefused", "OverLimit", "reason_of", "refusal_of")

_RETRY_AFTER_S = 1  # chosen: a worker or a Redis is away for seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRefusal:
    """An answer that is an error: status, text, the field at fault, when to try again, the method to use.

    `limit` names the limit of a key that was reached.
    """

    status: HTTPStatus
    message: str
    field: str | None = None
    retry_after_s: int | None = None
    limit: str = ""
    allow: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer, as vLLM's server words its own errors; a key's limit as OpenAI's does."""
        told = {
            "message": self.message,
            "type": self.limit or _TYPES[self.status],
            "param": self.field,
            "code": "rate_limit_exceeded" if self.limit else int(self.status),
        }
        return {"error": told}

    @property
    def reason(self) -> str:
        """Why, in one word, for metrics."""
        return self.limit or reason_of(self.status)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        told = {"Retry-After": self.retry_after_s, "Allow": self.allow}
        return {name: str(value) for name, value in told.items() if value is not None}


def reason_of(status: int) -> str:
    """The same of an answer of which no more is known."""
    return _REASONS.get(status, "error")


class HttpRefused(L4QueueError):
    """Carries a refusal that no error of the queue stands for."""

    def __init__(self, status: HTTPStatus, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.refusal = HttpRefusal(status=status, message=message, field=field)


class OverLimit(L4QueueError):
    """A limit of a key is reached. `headers` say which, where no exchange has them."""

    def __init__(self, refusal: HttpRefusal, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
        self.headers: Mapping[str, str] = headers or {}


def refusal_of(error: L4QueueError) -> HttpRefusal:
    """The answer that an error of the queue stands for."""
    if isinstance(error, OverLimit | HttpRefused):
        return error.refusal
    field = getattr(error, "field", None)
    retry_after_s: int | None = None
    match error:
        case QueueFull():
            status, retry_after_s = HTTPStatus.TOO_MANY_REQUESTS, max(1, ceil(error.retry_after_s))
        case ServiceUnavailable():
            status, retry_after_s = HTTPStatus.SERVICE_UNAVAILABLE, _RETRY_AFTER_S
        case InvalidRequest() | RequestTooLong():
            status = HTTPStatus.BAD_REQUEST
        case RequestFailed():
            status = HTTPStatus.BAD_REQUEST if field else HTTPStatus.INTERNAL_SERVER_ERROR
        case RequestExpired():
            status = HTTPStatus.GATEWAY_TIMEOUT
        case IdempotencyConflict() | RequestCancelled():
            status = HTTPStatus.CONFLICT
        case UnknownRequest():
            status = HTTPStatus.NOT_FOUND
        case _:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
    return HttpRefusal(status=status, message=str(error), field=field, retry_after_s=retry_after_s)


_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.METHOD_NOT_ALLOWED: "MethodNotAllowedError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "BadRequestError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
    HTTPStatus.GATEWAY_TIMEOUT: "DeadlineExceededError",
}
_REASONS: Mapping[int, str] = {
    HTTPStatus.BAD_REQUEST: "invalid",
    HTTPStatus.UNAUTHORIZED: "key",
    HTTPStatus.NOT_FOUND: "unknown",
    HTTPStatus.CONFLICT: "conflict",
    HTTPStatus.TOO_MANY_REQUESTS: "full",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
    HTTPStatus.GATEWAY_TIMEOUT: "deadline",
}
"""Labels of refusals; any other status is an error."""
