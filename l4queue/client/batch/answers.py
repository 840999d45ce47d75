"""Lines of the output and error files, in the shapes of OpenAI's batch API. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from l4queue.client.arguments import CHAT_PREFIX, COMPLETION_PREFIX
from l4queue.client.batch.lines import CHAT_URL, DIGEST_CHARS
from l4queue.client.batch.served import ModelNotServed
from l4queue.errors import InvalidRequest
from l4queue.json_lines import json_line
from l4queue.models import RequestState
from l4queue.protocol.records import OutputEntry, RequestRecord, TokenLogprobs
from l4queue.strict_json import is_unicode

__all__ = (
    "DUPLICATE",
    "INVALID",
    "Answer",
    "duplicate_line",
    "invalid_line",
    "is_about_a_line",
    "outcome_line",
    "read_answer",
    "refused_line",
    "stopped_line",
    "success_line",
)

INVALID = "invalid_line"
DUPLICATE = "duplicate_custom_id"
_ID = re.compile(rf"batch_req_(?P<name>.+?)(?:_(?P<digest>[0-9a-f]{{{DIGEST_CHARS}}}))?", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The line that an entry of the output or error file answers.

    `name` is that of a request or of a line. `digest` tells which line of the input it belongs to; files of
    earlier releases, and of other programs, have none. `line` is set for an error about a line.
    """

    custom_id: str | None
    name: str
    digest: str
    is_success: bool
    line: int | None


def success_line(
    record: RequestRecord,
    outputs: Sequence[OutputEntry],
    *,
    custom_id: str,
    url: str,
    model: str,
    digest: str = "",
    made: Mapping[str, Any] | None = None,
) -> bytes:
    """The output line of a request that is done. `model` answered it; `made` is the body that a gateway has made.

    `digest` is that of the line of the input.
    """
    prefix = CHAT_PREFIX if url == CHAT_URL else COMPLETION_PREFIX
    told = {"id": prefix + record.request_id, "created": record.submitted_ms // 1000, "model": model}
    body = {**(made or _answer_body(record, outputs, url)), **told}
    return _line(_name(record.request_id, digest), custom_id, response=_response(200, record.request_id, body))


def _answer_body(record: RequestRecord, outputs: Sequence[OutputEntry], url: str) -> dict[str, Any]:
    """The body of an answer but for what `success_line` says of it."""
    text = "".join(entry.text for entry in outputs)
    prompt_tokens, output_tokens = record.prompt_tokens or 0, record.offset
    told, rows = None, [row for entry in outputs for row in entry.logprobs or ()]
    if rows:
        told = _chat_logprobs(rows) if url == CHAT_URL else _completion_logprobs(rows)
    choice: dict[str, Any] = {"index": 0, "logprobs": told, "finish_reason": record.finish_reason}
    if url == CHAT_URL:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    return {
        "object": "chat.completion" if url == CHAT_URL else "text_completion",
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            **_details(record),
        },
    }


def _details(record: RequestRecord) -> dict[str, Any]:
    """Of the prompt's tokens, as vLLM's server tells them; nothing where the engine told nothing."""
    if record.cached_tokens is None:
        return {}
    return {"prompt_tokens_details": {"cached_tokens": record.cached_tokens}}


def outcome_line(
    record: RequestRecord, *, custom_id: str, digest: str = "", names: Mapping[str, str] | None = None
) -> bytes:
    """The error line of a request that ended in another way than done. `names` has fields as the line has them."""
    name = _name(record.request_id, digest)
    message = record.error or f"the request ended as {record.state.value}"
    if record.state is not RequestState.FAILED:
        error = {"code": f"request_{record.state.value}", "message": message}
        return _line(name, custom_id, error=error)
    status = 400 if record.field else 500
    body = _error_body(status, message, _written(record.field, names))
    return _line(name, custom_id, response=_response(status, record.request_id, body))


def refused_line(
    error: InvalidRequest,
    *,
    request_id: str,
    custom_id: str,
    digest: str = "",
    names: Mapping[str, str] | None = None,
    status: int = 400,
) -> bytes:
    """The error line of a request whose body cannot be right, or whose output makes no answer."""
    message, code = str(error).removeprefix(f"{error.field}: "), None
    if isinstance(error, ModelNotServed):
        status, code = 404, "model_not_found"
    response = _response(status, request_id, _error_body(status, message, _written(error.field, names), code=code))
    return _line(_name(request_id, digest), custom_id, response=response)


def stopped_line(code: str, message: str, *, request_id: str, custom_id: str, digest: str) -> bytes:
    """The error line of a request that was not computed, because its batch has ended before."""
    return _line(_name(request_id, digest), custom_id, error={"code": code, "message": message})


def invalid_line(error: InvalidRequest, *, number: int, digest: str = "") -> bytes:
    """The error line of line `number`, which has no custom_id that could be repeated."""
    told = {"code": INVALID, "message": str(error), "line": number}
    return _line(_name(f"line_{number}", digest), None, error=told)


def duplicate_line(custom_id: str, *, number: int, first: int, digest: str = "") -> bytes:
    """The error line of line `number`, whose custom_id line `first` has already."""
    message = f"line {first} has this custom_id already"
    told = {"code": DUPLICATE, "message": message, "line": number}
    return _line(_name(f"line_{number}", digest), custom_id, error=told)


def read_answer(answer: dict[str, Any]) -> Answer | None:
    """A line of the output or error file; None for what says neither a response nor an error."""
    custom_id, response, error = answer.get("custom_id"), answer.get("response"), answer.get("error")
    line = is_about_a_line(answer)
    if not (isinstance(custom_id, str) and is_unicode(custom_id)) and not (custom_id is None and line is not None):
        return None
    if (response is None) == (error is None):
        return None
    if error is None and not (
        isinstance(response, dict)
        and isinstance(response.get("body"), dict)
        and type(response.get("status_code")) is int
    ):
        return None
    if response is None and not (isinstance(error, dict) and isinstance(error.get("code"), str)):
        return None
    found = _ID.fullmatch(str(answer.get("id")))
    return Answer(
        custom_id=custom_id,
        name=found["name"] if found else "",
        digest=(found["digest"] or "") if found else "",
        is_success=response is not None and response["status_code"] == 200,
        line=line,
    )


def is_about_a_line(answer: dict[str, Any]) -> int | None:
    """The line number of an `invalid_line` or `duplicate_line`; None for the answer to a request."""
    error = answer.get("error")
    if isinstance(error, dict) and error.get("code") in (INVALID, DUPLICATE):
        number = error.get("line")
        return number if type(number) is int else None
    return None


def _name(name: str, digest: str) -> str:
    return f"{name}_{digest}" if digest else name


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


def _error_body(status: int, message: str, field: str | None, *, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field or None, "code": code}}


def _written(field: str | None, names: Mapping[str, str] | None) -> str | None:
    """A field by the name that it has in the line."""
    return (names or {}).get((field or "").partition(".")[0], field)


def _chat_logprobs(rows: Sequence[TokenLogprobs]) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": _token(token_id), "logprob": logprob, "bytes": None}

    content = [
        {**one(row.token_id, row.logprob), "top_logprobs": [one(*each) for each in row.top]} for row in rows
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(rows: Sequence[TokenLogprobs]) -> dict[str, Any]:
    tops = [{_token(i): value for i, value in ((row.token_id, row.logprob), *row.top)} for row in rows]
    return {
        "tokens": [_token(row.token_id) for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": tops,
        "text_offset": None,
    }


def _token(token_id: int) -> str:
    """A token as vLLM tells it with `return_tokens_as_token_ids`: a client has no tokenizer."""
    return f"token_id:{token_id}"
