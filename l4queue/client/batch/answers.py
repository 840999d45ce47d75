"""Lines of the output and error files, in the shapes of OpenAI's batch API. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l4queue.client.batch.lines import CHAT_URL
from l4queue.errors import InvalidRequest
from l4queue.json_lines import json_line
from l4queue.models import RequestState
from l4queue.protocol.records import OutputEntry, RequestRecord

__all__ = (
    "DUPLICATE",
    "INVALID",
    "duplicate_line",
    "invalid_line",
    "is_about_a_line",
    "outcome_line",
    "refused_line",
    "success_line",
)

INVALID = "invalid_line"
DUPLICATE = "duplicate_custom_id"


def success_line(
    record: RequestRecord, outputs: Sequence[OutputEntry], *, custom_id: str, url: str, model: str
) -> bytes:
    """The output line of a request that is done."""
    text = "".join(entry.text for entry in outputs)
    prompt_tokens, output_tokens = record.prompt_tokens or 0, record.offset
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": record.finish_reason}
    if url == CHAT_URL:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    body = {
        "id": ("chatcmpl-" if url == CHAT_URL else "cmpl-") + record.request_id,
        "object": "chat.completion" if url == CHAT_URL else "text_completion",
        "created": record.submitted_ms // 1000,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
        },
    }
    return _line(record.request_id, custom_id, response=_response(200, record.request_id, body))


def outcome_line(record: RequestRecord, *, custom_id: str) -> bytes:
    """The error line of a request that ended in another way than done."""
    message = record.error or f"the request ended as {record.state.value}"
    if record.state is not RequestState.FAILED:
        error = {"code": f"request_{record.state.value}", "message": message}
        return _line(record.request_id, custom_id, error=error)
    status = 400 if record.field else 500
    body = _error_body(status, message, record.field)
    return _line(record.request_id, custom_id, response=_response(status, record.request_id, body))


def refused_line(error: InvalidRequest, *, request_id: str, custom_id: str) -> bytes:
    """The error line of a request that was never sent: its body cannot be right."""
    message = str(error).removeprefix(f"{error.field}: ")
    response = _response(400, request_id, _error_body(400, message, error.field))
    return _line(request_id, custom_id, response=response)


def invalid_line(error: InvalidRequest, *, number: int) -> bytes:
    """The error line of line `number`, which has no custom_id that could be repeated."""
    return _line(f"line_{number}", None, error={"code": INVALID, "message": str(error), "line": number})


def duplicate_line(custom_id: str, *, number: int, first: int) -> bytes:
    """The error line of line `number`, whose custom_id line `first` has already."""
    message = f"line {first} has this custom_id already"
    return _line(f"line_{number}", custom_id, error={"code": DUPLICATE, "message": message, "line": number})


def is_about_a_line(answer: dict[str, Any]) -> int | None:
    """The line number of an `invalid_line` or `duplicate_line`; None for the answer to a request."""
    error = answer.get("error")
    if isinstance(error, dict) and error.get("code") in (INVALID, DUPLICATE):
        number = error.get("line")
        return number if isinstance(number, int) else None
    return None


def _line(
    name: str,
    custom_id: str | None,
    *,
    response: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> bytes:
    answer = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error}
    return json_line(answer).encode("utf-8", "replace") + b"\n"


def _response(status: int, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": request_id, "body": body}


def _error_body(status: int, message: str, field: str | None) -> dict[str, Any]:
    kind = "invalid_request_error" if status == 400 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field or None, "code": None}}
