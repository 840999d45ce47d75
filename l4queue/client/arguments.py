"""Arguments of callers: checked, or refused with the field that is wrong. Does no I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from l4queue.errors import InvalidRequest, UnknownRequest
from l4queue.models import ChatMessage, RequestSpec, SamplingParams
from l4queue.plain_values import plain_value
from l4queue.sampling import NOT_OFFERED, StructuredOutputs
from l4queue.strict_json import JsonError, check_text
from l4queue.validation import first_fault

__all__ = (
    "CHAT_PREFIX",
    "COMPLETION_PREFIX",
    "RESPONSE_PREFIX",
    "WITHOUT_EFFECT",
    "build_spec",
    "checked_count",
    "checked_id",
    "checked_patience",
    "checked_text",
    "id_in_queue",
    "printable",
    "spec_of",
    "text_of_parts",
    "unknown_parameter",
)

_SPEC_FIELDS = frozenset(RequestSpec.model_fields) - {"params"}
_KNOWN = (*RequestSpec.model_fields, *SamplingParams.model_fields)
_ELSEWHERE = {
    "deadline": "is called deadline_s and is a number of seconds",
    "max_completion_tokens": "is called max_tokens",
    "model": "is not chosen by a request: a deployment serves one, L4_MODEL",
    "prompt_token_ids": "is called token_ids",
    "sampling_params": "is called params",
    "tool_choice": "is offered over HTTP: docs/http.md",
    "tools": "are offered over HTTP: docs/http.md",
    "stream": "is a method of the handle: enqueue(...).stream()",
    "timeout": "is an argument of result() and stream(); deadline_s ends the request itself",
}
"""Arguments of other interfaces, with their place here."""
WITHOUT_EFFECT = frozenset(
    {
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "user",
    }
)
"""Fields of OpenAI's bodies that change nothing in the output: HTTP and batches ignore them."""
CHAT_PREFIX, COMPLETION_PREFIX, RESPONSE_PREFIX = "chatcmpl-", "cmpl-", "resp_"
"""What answers over HTTP and of batches write before the id of a request, as OpenAI's do."""
_TEXT_OR_TEXTS = frozenset({"stop", "bad_words"})
_KNOWN_WITHIN = {
    "messages": tuple(ChatMessage.model_fields),
    "structured_outputs": tuple(field.alias or name for name, field in StructuredOutputs.model_fields.items()),
}
_MAX_ID_CHARS, _MAX_NAME_CHARS = 512, 200  # of an id; of a name shown in an error
_MAX_COUNT = 1_000_000  # entries that a caller may ask for; more would not fit one reply
_MAX_PATIENCE_S = 86_400.0  # a day; chosen: longer is a mistake of units


def build_spec(
    prompt: str | RequestSpec | None = None,
    params: SamplingParams | Mapping[str, Any] | None = None,
    **options: Any,
) -> RequestSpec:
    """One validated request from the arguments of `enqueue`; InvalidRequest names the first bad one.

    Sampling parameters (`SamplingParams`) and request fields (`RequestSpec`) share one flat namespace. Those in
    `params` count less than those beside it. A RequestSpec stands alone.
    """
    if isinstance(prompt, RequestSpec):
        for name in (*(["params"] if params is not None else []), *options):
            raise InvalidRequest("belongs into the RequestSpec that is enqueued", field=printable(name))
        return _checked_again(prompt)
    fields: dict[str, Any] = {} if prompt is None else {"prompt": _one_text(prompt)}
    sampling = _sampling_of(params)
    for name, value in options.items():
        if name in _SPEC_FIELDS:
            if value is not None:
                fields[name] = value
        elif name in SamplingParams.model_fields:
            if value is not None:
                sampling[name] = value
        else:
            raise unknown_parameter(name)
    if "messages" in fields:
        fields["messages"] = _plain_messages(fields["messages"])
    fields["params"] = sampling
    try:
        return RequestSpec.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, is_flat=True) from None


def unknown_parameter(name: str, *, known: Collection[str] = _KNOWN, field: str | None = None) -> InvalidRequest:
    """The error for a name that is no parameter: what to use in its place, or the nearest known name.

    `field` is where it stands, by default on top.
    """
    told = NOT_OFFERED.get(name) or _ELSEWHERE.get(name) if known is _KNOWN else None
    if told is None:
        from difflib import get_close_matches  # for an error alone

        near = get_close_matches(name[:_MAX_NAME_CHARS].lower(), known, n=1)
        told = f"unknown parameter; did you mean {near[0]}?" if near else "unknown parameter"
    return InvalidRequest(told, field=printable(name if field is None else field))


def _one_text(prompt: object) -> object:
    if isinstance(prompt, str):
        return prompt
    told = "must be one text; enqueue_many takes several, messages= a chat, token_ids= ids of the vocabulary"
    raise InvalidRequest(told, field="prompt")


def _sampling_of(params: object) -> dict[str, Any]:
    """What was set in a value of sampling parameters."""
    if params is None:
        return {}
    if isinstance(params, SamplingParams):  # `model_construct` and `model_copy` change it unchecked
        return {name: value for name, value in vars(params).items() if name in params.model_fields_set}
    if not isinstance(params, Mapping):
        raise InvalidRequest("must be SamplingParams, or a dictionary of them", field="params")
    for name in params:
        if name not in SamplingParams.model_fields:
            raise unknown_parameter(str(name))
    return {name: value for name, value in params.items() if value is not None}


def _plain_messages(messages: Any) -> Any:
    """Messages with the text of their parts, without names: a model's template has no place for one."""
    given = plain_value(messages)
    if not isinstance(given, tuple):
        return messages
    return tuple(
        _plain_message(message, index) if isinstance(message, Mapping) else message
        for index, message in enumerate(given)
    )


def _plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    plain = {name: value for name, value in message.items() if name != "name"}
    if isinstance(plain.get("content"), list | tuple):
        plain["content"] = text_of_parts(plain["content"], field=f"messages.{index}.content")
    return plain


def text_of_parts(parts: Sequence[Any], *, field: str) -> str:
    """The text of a message's parts; InvalidRequest where one is an image or another thing."""
    for part in parts:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise InvalidRequest("only parts of type text are offered", field=field)
    return "\n".join(part["text"] for part in parts)


def _refusal(error: ValidationError, *, is_flat: bool = False) -> InvalidRequest:
    """The first of the errors, by the names of the caller; `is_flat`: sampling parameters stood on top."""
    place, told = first_fault(error)
    if is_flat and place[:1] == ("params",):
        place = place[1:]
    subject = told.partition(" ")[0]  # of what several fields say together
    field = ".".join(map(str, place)) or (subject if subject in _KNOWN else "request")
    if told == "unknown parameter":
        return unknown_parameter(str(place[-1]), known=_KNOWN_WITHIN.get(str(place[0]), _KNOWN), field=field)
    if told == "must be a list" and field in _TEXT_OR_TEXTS:
        told = "must be a text, or a list of texts"
    return InvalidRequest(told, field=printable(field))


def _checked_again(spec: RequestSpec) -> RequestSpec:
    """The same, checked: `model_construct`, `model_copy` and its own dictionaries change it unchecked."""
    given = {name: value for name, value in vars(spec).items() if name in RequestSpec.model_fields}
    try:
        return RequestSpec.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None


def spec_of(request: object, common: Mapping[str, Any]) -> RequestSpec:
    """The request that an element of `enqueue_many` stands for."""
    if isinstance(request, RequestSpec):
        return _checked_again(request)
    if isinstance(request, str):
        return build_spec(**{**common, "prompt": request})
    if not isinstance(request, dict) or not all(isinstance(name, str) for name in request):
        raise InvalidRequest("must be a prompt, a dictionary of arguments or a RequestSpec", field="request")
    return build_spec(**{**common, **request})


def checked_text(value: object, *, field: str, most_chars: int) -> str:
    """A text from a caller that can be stored; InvalidRequest names what is wrong with it."""
    if not isinstance(value, str):
        raise InvalidRequest("must be a text", field=field)
    if len(value) > most_chars:
        raise InvalidRequest(f"has {len(value)} characters; at most {most_chars} are accepted", field=field)
    try:
        check_text(value)
    except JsonError as error:
        raise InvalidRequest(str(error), field=field) from None
    return value


def checked_count(count: object) -> int:
    """How many entries to read at most; InvalidRequest for what is no such number."""
    if type(count) is not int or not 0 <= count <= _MAX_COUNT:
        raise InvalidRequest(f"must be a whole number in [0, {_MAX_COUNT}]", field="count")
    return count


def checked_patience(timeout_s: object) -> float:
    """How long a client waits for Redis, s; InvalidRequest for what is no such number."""
    value = plain_value(timeout_s)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_PATIENCE_S:
        raise InvalidRequest(f"must be a number of seconds in [0, {_MAX_PATIENCE_S:.0f}]", field="timeout_s")
    return float(value)


def checked_id(request_id: object) -> str:
    """An id as there may be one; UnknownRequest for what never was one."""
    try:
        return checked_text(request_id, field="request_id", most_chars=_MAX_ID_CHARS)
    except InvalidRequest as error:
        raise UnknownRequest(f"no such request: {error}") from None


def id_in_queue(request_id: object) -> str:
    """The id by which the queue knows a request, from that id or from the one in an answer over HTTP."""
    checked = checked_id(request_id)
    for prefix in (CHAT_PREFIX, COMPLETION_PREFIX, RESPONSE_PREFIX):
        if checked.startswith(prefix):
            return checked.removeprefix(prefix)
    return checked


def printable(name: str) -> str:
    """A name that a caller wrote, as an error can tell it: in one line, of bounded length, in valid Unicode."""
    return name.encode("utf-8", "backslashreplace").decode()[:_MAX_NAME_CHARS] or "''"
