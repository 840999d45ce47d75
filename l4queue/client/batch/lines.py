"""Lines of a batch file: OpenAI's batch format to requests. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from l4queue.client.arguments import build_spec, checked_text, printable, unknown_parameter
from l4queue.errors import InvalidRequest
from l4queue.models import RequestSpec, SamplingParams
from l4queue.strict_json import JsonError, canonical_json, parse_json

__all__ = (
    "CHAT_URL",
    "COMPLETIONS_URL",
    "DIGEST_CHARS",
    "MAX_LINE_BYTES",
    "BatchLine",
    "LineObject",
    "digest_of_bytes",
    "object_of",
    "parse_line",
)

MAX_LINE_BYTES = 128 * 2**20
"""Longest line that is read, bytes: the longest prompt, each character of it escaped."""
DIGEST_CHARS = 40  # hexadecimal: 160 bits, no two lines of a batch collide
CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
_SAMPLING = frozenset(SamplingParams.model_fields) | {"priority"}
_NO_EFFECT = frozenset({"model", "user", "metadata", "store", "service_tier", "safety_identifier"})
_NOT_OFFERED: Mapping[str, tuple[Any, ...]] = {  # what cannot be done, with the values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """One readable line: its request, and what its answer has to repeat."""

    custom_id: str
    url: str
    model: str
    spec: RequestSpec
    digest: str


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
        has_own = any(given.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
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


def parse_line(raw: bytes, *, max_tokens: int | None, priority: int, idempotency_key: str) -> BatchLine:
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
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise InvalidRequest(f"must be {CHAT_URL} or {COMPLETIONS_URL}", field="url")
    options = {"max_tokens": max_tokens, "priority": priority, **_options(body)}
    spec = build_spec(**_prompt(body, url), **options, idempotency_key=idempotency_key)
    model = checked_text("" if body.get("model") is None else body["model"], field="model", most_chars=512)
    digest = found.digest(max_tokens=max_tokens)
    return BatchLine(custom_id=found.custom_id, url=url, model=model, spec=spec, digest=digest)


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
    if odd := [name for name, v in message.items() if name not in ("role", "content", "name") and v is not None]:
        raise InvalidRequest("is not offered", field=printable(f"{field}.{odd[0]}"))
    content = message.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
        ):
            raise InvalidRequest("only parts of type text are offered", field=f"{field}.content")
        content = "\n".join(part["text"] for part in content)
    return {"role": message.get("role"), "content": content}


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters of a body by our names, without what is null."""
    options: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _NO_EFFECT or name in ("messages", "prompt"):
            continue
        if name in _NOT_OFFERED:
            if not any(type(value) is type(idle) and value == idle for idle in _NOT_OFFERED[name]):
                raise InvalidRequest("is not offered", field=name)
        elif name == "max_completion_tokens":
            options["max_tokens"] = value
        elif name == "stop":
            options["stop"] = [value] if isinstance(value, str) else value
        elif name in _SAMPLING:
            options[name] = value
        else:
            raise unknown_parameter(name)
    return options
