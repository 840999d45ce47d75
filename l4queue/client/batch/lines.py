"""Lines of a batch file: OpenAI's batch format to requests. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from l4queue.client.arguments import (
    WITHOUT_EFFECT,
    build_spec,
    checked_text,
    printable,
    text_of_parts,
    unknown_parameter,
)
from l4queue.errors import InvalidRequest
from l4queue.models import RequestSpec, SamplingParams
from l4queue.strict_json import JsonError, canonical_json, parse_json

__all__ = (
    "CHAT_URL",
    "COMPLETIONS_URL",
    "DIGEST_CHARS",
    "MAX_LINE_BYTES",
    "RESPONSES_URL",
    "BatchLine",
    "LineObject",
    "RequestWriter",
    "body_of",
    "digest_of_bytes",
    "object_of",
    "parse_line",
    "written_names",
)

MAX_LINE_BYTES = 128 * 2**20
"""Longest line that is read, bytes: the longest prompt, each character of it escaped."""
DIGEST_CHARS = 40  # hexadecimal: 160 bits, no two lines of a batch collide
CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
RESPONSES_URL = "/v1/responses"
"""Written by a gateway only: what a response asks for is vLLM's to say."""
_SAMPLING = frozenset(SamplingParams.model_fields) | {"priority"}
_MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_READ_ELSEWHERE = frozenset({"model", "messages", "prompt", "response_format", "logprobs", "top_logprobs"})
_NOT_OFFERED: Mapping[str, tuple[Any, ...]] = {  # what cannot be done, with the values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "return_tokens_as_token_ids": (True,),
    "use_beam_search": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_OF_TOOLS = frozenset({"tools", "tool_choice", "functions", "function_call", "tool_calls", "tool_call_id"})
_OF_TEMPLATES = frozenset(
    {"chat_template", "chat_template_kwargs", "documents", "add_generation_prompt", "continue_final_message"}
)
_TEMPLATE = "needs a gateway, which has vLLM's templates: --gateway URL (gateway=), or /v1/batches"
_TOOLS = "needs a gateway, which has vLLM's parsers of tool calls: --gateway URL (gateway=), or /v1/batches"
_WRITTEN = (("structured_outputs", "response_format"), ("max_tokens", "max_completion_tokens"))
_ANY_OBJECT = {"json": {"type": "object"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """One readable line: its request, and what its answer has to repeat. `names` are those of `written_names`.

    With `by_gateway` a gateway has written the request and makes the answer.
    """

    custom_id: str
    url: str
    model: str
    spec: RequestSpec
    digest: str
    names: dict[str, str]
    by_gateway: bool = False


class RequestWriter(Protocol):
    """A gateway that writes requests: all of them, or only where a batch cannot."""

    writes_all: bool

    def write(self, url: str, body: Mapping[str, Any]) -> RequestSpec:
        """The request that a body with `max_tokens` and `priority` asks for; InvalidRequest names a bad field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineObject:
    """A line that can be answered by name; whether its body can be computed is another question."""

    custom_id: str
    fields: dict[str, Any]

    def digest(self, *, max_tokens: int | None) -> str:
        """Identity of the request that an answer belongs to, however its JSON is written.

        `max_tokens` is that of the batch and counts where the line says none of its own.
        """
        body = self.fields.get("body")
        given = body if isinstance(body, dict) else {}
        has_own = any(given.get(name) is not None for name in _MAX_TOKENS)
        told = {"line": self.fields} if has_own else {"line": self.fields, "max_tokens": max_tokens}
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()[:DIGEST_CHARS]


def digest_of_bytes(raw: bytes) -> str:
    """The digest of a line that is no request, by its bytes."""
    return hashlib.sha256(b"bytes:" + raw.strip()).hexdigest()[:DIGEST_CHARS]


def object_of(raw: bytes) -> LineObject:
    """A line as JSON. InvalidRequest when it is no object, is ambiguous, or has no usable `custom_id`."""
    try:
        line = parse_json(raw, max_bytes=MAX_LINE_BYTES)
    except JsonError as error:
        raise InvalidRequest(str(error), field="line") from None
    if not isinstance(line, dict):
        raise InvalidRequest("must be a JSON object", field="line")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        raise InvalidRequest("must be a text of 1 to 512 characters", field="custom_id")
    return LineObject(custom_id=checked_text(custom_id, field="custom_id", most_chars=512), fields=line)


def parse_line(
    raw: bytes,
    *,
    max_tokens: int | None,
    priority: int,
    idempotency_key: str,
    writer: RequestWriter | None = None,
) -> BatchLine:
    """The request of a line; what its body leaves open is taken from the arguments.

    InvalidRequest names the field at fault. A body's own `priority` counts more than the batch's.
    """
    found = object_of(raw)
    line, body = found.fields, found.fields.get("body")
    if not isinstance(body, dict):
        raise InvalidRequest("must be an object", field="body")
    if line.get("method", "POST") != "POST":
        raise InvalidRequest("must be POST", field="method")
    url = line.get("url")
    if url is None or url == "":
        url = CHAT_URL if "messages" in body else COMPLETIONS_URL
    if url not in (CHAT_URL, COMPLETIONS_URL, RESPONSES_URL):
        raise InvalidRequest(f"must be {CHAT_URL}, {COMPLETIONS_URL} or {RESPONSES_URL}", field="url")
    model = checked_text("" if body.get("model") is None else body["model"], field="model", most_chars=512)
    spec, by_gateway = _spec(body, url, max_tokens=max_tokens, priority=priority, writer=writer)
    return BatchLine(
        custom_id=found.custom_id,
        url=url,
        model=model,
        spec=spec.model_copy(update={"idempotency_key": idempotency_key}),
        digest=found.digest(max_tokens=max_tokens),
        names={} if by_gateway else written_names(body),
        by_gateway=by_gateway,
    )


def _spec(
    body: Mapping[str, Any], url: str, *, max_tokens: int | None, priority: int, writer: RequestWriter | None
) -> tuple[RequestSpec, bool]:
    """The request, and whether a gateway wrote it."""
    if url == RESPONSES_URL and writer is None:
        raise InvalidRequest(f"{url} needs a gateway, which writes its request: --gateway URL", field="url")
    if writer is None or not (writer.writes_all or url == RESPONSES_URL):
        try:
            options = {"max_tokens": max_tokens, "priority": priority, **_options(body)}
            options |= _response_format(body) | _logprobs(body, url)
            return build_spec(**_prompt(body, url), **options), False
        except InvalidRequest:
            if writer is None:
                raise
    return writer.write(url, _completed(body, url, max_tokens=max_tokens, priority=priority)), True


def body_of(raw: bytes, url: str, *, max_tokens: int | None) -> dict[str, Any]:
    """The body of a line that a gateway wrote, as it was given to it but for its priority."""
    return _completed(object_of(raw).fields["body"], url, max_tokens=max_tokens, priority=0)


def _completed(body: Mapping[str, Any], url: str, *, max_tokens: int | None, priority: int) -> dict[str, Any]:
    """A body with what the batch adds, and without its model, which is checked elsewhere."""
    told = {name: value for name, value in body.items() if name != "model"}
    if all(told.get(name) is None for name in _MAX_TOKENS) and max_tokens is not None:
        told["max_output_tokens" if url == RESPONSES_URL else "max_tokens"] = max_tokens
    if told.get("priority") is None:
        told["priority"] = priority
    return told


def written_names(body: object) -> dict[str, str]:
    """Our names of fields, with the names under which a body has them, where these differ."""
    if not isinstance(body, dict):
        return {}
    return {ours: name for ours, name in _WRITTEN if body.get(name) is not None and body.get(ours) is None}


def _prompt(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The one argument of `build_spec` that carries the prompt."""
    name, other = ("messages", "prompt") if url == CHAT_URL else ("prompt", "messages")
    if body.get(other) is not None:
        raise InvalidRequest(f"does not belong to {url}", field=other)
    given = body.get(name)
    if given is None:
        raise InvalidRequest("is missing", field=name)
    if url == CHAT_URL:
        if not isinstance(given, list):
            raise InvalidRequest("must be a list", field="messages")
        return {"messages": [_message(message, i) for i, message in enumerate(given)]}
    if isinstance(given, list) and len(given) == 1 and not isinstance(given[0], int):
        given = given[0]  # a list of one prompt
    if isinstance(given, str):
        return {"prompt": given}
    if isinstance(given, list) and all(type(token) is int for token in given):
        return {"token_ids": given}
    raise InvalidRequest("must be one text or one list of token ids", field="prompt")


def _message(message: Any, index: int) -> dict[str, Any]:
    """Role and text of a message; content may be a list of text parts."""
    field = f"messages.{index}"
    if not isinstance(message, dict):
        raise InvalidRequest("must be an object", field=field)
    for name, value in message.items():
        if name not in ("role", "content", "name") and value not in (None, []):
            raise InvalidRequest(_why_not(name), field=printable(f"{field}.{name}"))
    content = message.get("content")
    if isinstance(content, list):
        content = text_of_parts(content, field=f"{field}.content")
    return {"role": message.get("role"), "content": content}


def _why_not(name: str) -> str:
    if name in _OF_TEMPLATES:
        return _TEMPLATE
    return _TOOLS if name in _OF_TOOLS else "is not offered"


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters of a body by our names, without what is null."""
    options: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in WITHOUT_EFFECT or name in _READ_ELSEWHERE:
            continue
        if name in _NOT_OFFERED:
            if not any(type(value) is type(idle) and value == idle for idle in _NOT_OFFERED[name]):
                raise InvalidRequest(_why_not(name), field=name)
        elif name == "max_completion_tokens":
            options["max_tokens"] = value
        elif name == "max_tokens" and body.get("max_completion_tokens") is not None:
            continue  # its older name
        elif name == "stop":
            options["stop"] = [value] if isinstance(value, str) else value
        elif name in _SAMPLING:
            options[name] = value
        else:
            raise unknown_parameter(name)
    return options


def _response_format(body: Mapping[str, Any]) -> dict[str, Any]:
    """The constraint that OpenAI's `response_format` stands for; nothing for plain text."""
    given, field = body.get("response_format"), "response_format"
    if given is None:
        return {}
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return {}
    if body.get("structured_outputs") is not None:
        raise InvalidRequest("says what structured_outputs says; leave one out", field=field)
    if kind == "json_object":
        return {"structured_outputs": _ANY_OBJECT}
    if kind == "structural_tag":
        return {"structured_outputs": {"structural_tag": given}}
    if kind != "json_schema":
        told = "must have a type: text, json_object, json_schema or structural_tag"
        raise InvalidRequest(told, field=field)
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise InvalidRequest("must be an object: a schema", field=f"{field}.json_schema.schema")
    return {"structured_outputs": {"json": schema}}


def _logprobs(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Our `logprobs` for those of a body: a number for completions; a truth and `top_logprobs` for chats."""
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if url == COMPLETIONS_URL:
        if top is not None:
            raise InvalidRequest(f"does not belong to {url}", field="top_logprobs")
        return {} if wanted is None or wanted is False else {"logprobs": wanted}
    if not isinstance(wanted, bool | None):
        raise InvalidRequest("must be true or false; top_logprobs is the number", field="logprobs")
    if wanted:
        if top is not None and (type(top) is not int or not 0 <= top <= 20):
            raise InvalidRequest("must be a whole number in [0, 20]", field="top_logprobs")
        return {"logprobs": top or 0}
    if top:
        raise InvalidRequest("needs logprobs: true", field="top_logprobs")
    return {}
