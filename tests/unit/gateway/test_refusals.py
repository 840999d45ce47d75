"""Errors of the queue as answers of OpenAI's API."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from gateway.refusals import HttpRefusal, OverLimit, refusal_of
from l4queue.errors import (
    IdempotencyConflict,
    InvalidRequest,
    L4QueueError,
    OutputLost,
    QueueFull,
    RequestCancelled,
    RequestDead,
    RequestExpired,
    RequestFailed,
    RequestTooLong,
    ServiceUnavailable,
    UnknownRequest,
)


@pytest.mark.parametrize(
    ("error", "status", "field", "headers"),
    [
        (QueueFull("full", retry_after_s=2.1), 429, None, {"Retry-After": "3"}),
        (QueueFull("full", retry_after_s=0.0), 429, None, {"Retry-After": "1"}),
        (ServiceUnavailable("away"), 503, None, {"Retry-After": "1"}),
        (InvalidRequest("no", field="stop"), 400, "stop", {}),
        (RequestTooLong("long", request_id="a", field="max_tokens"), 400, "max_tokens", {}),
        (RequestFailed("bad", request_id="a", field="structured_outputs"), 400, "structured_outputs", {}),
        (RequestFailed("engine", request_id="a"), 500, None, {}),
        (RequestExpired("late", request_id="a"), 504, None, {}),
        (RequestCancelled("gone", request_id="a"), 409, None, {}),
        (RequestDead("dead", request_id="a"), 500, None, {}),
        (IdempotencyConflict("other"), 409, None, {}),
        (UnknownRequest("none"), 404, None, {}),
        (OutputLost("lost"), 500, None, {}),
    ],
)
def test_status_field_and_headers(
    error: L4QueueError, status: int, field: str | None, headers: dict[str, str]
) -> None:
    """The body has OpenAI's form, with the field at fault."""
    refusal = refusal_of(error)
    assert refusal.status == status
    assert refusal.headers == headers
    told = refusal.body["error"]
    assert (told["message"], told["param"], told["code"]) == (str(error), field, status)
    assert told["type"].endswith("Error")


def test_a_limit_of_a_key_is_told_as_openai_tells_it() -> None:
    """Clients look at the code and at the type."""
    told = HttpRefusal(status=HTTPStatus.TOO_MANY_REQUESTS, message="wait", retry_after_s=4, limit="tokens")
    refusal = refusal_of(OverLimit(told))
    assert refusal.headers == {"Retry-After": "4"}
    error = {"message": "wait", "type": "tokens", "param": None, "code": "rate_limit_exceeded"}
    assert refusal.body == {"error": error}
    assert (refusal.reason, refusal_of(QueueFull("full", retry_after_s=1.0)).reason) == ("tokens", "full")
