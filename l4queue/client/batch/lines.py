"""Lines of a batch file: OpenAI's batch format to requests. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from l4queue.client.compose import build_spec
from l4queue.errors import InvalidRequest
from l4queue.models import RequestSpec, SamplingParams

__all__ = ("CHAT_URL", "COMPLETIONS_URL", "BatchLine", "custom_id_of", "parse_line")

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
    "logit_bias": ({},),
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


def custom_id_of(raw: bytes) -> str:
    """The `custom_id` of a line. InvalidRequest when it is no JSON object or has no usable one."""
    return _object_of(raw)[0]


def parse_line(raw: bytes, *, max_tokens: int | None, priority: int, idempotency_key: str) -> BatchLine:
    """The request of a line; what its body leaves open is taken from the arguments.

    InvalidRequest names the field at fault. A body's own `priority` counts more than the batch's.
    """
    custom_id, line = _object_of(raw)
    body = line.get("body")
    if not isinstance(body, dict):
        raise InvalidRequest("must be an object", field="body")
    if line.get("method", "POST") != "POST":
        raise InvalidRequest("must be POST", field="method")
    url = line.get("url") or (CHAT_URL if "messages" in body else COMPLETIONS_URL)
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise InvalidRequest(f"must be {CHAT_URL} or {COMPLETIONS_URL}", field="url")
    options = {"max_tokens": max_tokens, "priority": priority, **_options(body)}
    spec = build_spec(**_prompt(body, url), **options, idempotency_key=idempotency_key)
    return BatchLine(custom_id=custom_id, url=url, model=str(body.get("model") or ""), spec=spec)


def _object_of(raw: bytes) -> tuple[str, dict[str, Any]]:
    try:
        line = json.loads(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"not valid UTF-8 at byte {error.start + 1}", field="line") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"not JSON: {error.msg} at column {error.colno}", field="line") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested as deep
        raise InvalidRequest("not JSON that can be read", field="line") from None
    if not isinstance(line, dict):
        raise InvalidRequest("must be a JSON object", field="line")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        raise InvalidRequest("must be a text of 1 to 512 characters", field="custom_id")
    if any("\ud800" <= character <= "\udfff" for character in custom_id):
        raise InvalidRequest("has half of a surrogate pair", field="custom_id")
    return custom_id, line


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
        raise InvalidRequest("is not offered", field=f"{field}.{odd[0]}")
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
            if value not in _NOT_OFFERED[name]:
                raise InvalidRequest("is not offered", field=name)
        elif name == "max_completion_tokens":
            options["max_tokens"] = value
        elif name == "stop":
            options["stop"] = [value] if isinstance(value, str) else value
        elif name in ("temperature", "top_p", "min_p") or name.endswith("_penalty"):
            options[name] = float(value) if type(value) is int else value
        elif name in _SAMPLING:
            options[name] = value
        else:
            raise InvalidRequest("unknown parameter", field=name)
    return options
