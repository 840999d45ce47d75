"""Fields of OpenAI's bodies: which are served, and a refusal that names any other one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from l4queue.client.arguments import WITHOUT_EFFECT, printable
from l4queue.errors import InvalidRequest

__all__ = (
    "CHAT",
    "COMPLETIONS",
    "RESPONSES",
    "SERVED",
    "BodyFields",
    "check_fields",
    "described",
    "fields_of_vllm",
    "vllm_bodies",
)

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SAMPLING = _names(
    "frequency_penalty ignore_eos include_stop_str_in_output logit_bias min_p presence_penalty priority "
    "repetition_penalty request_id seed skip_special_tokens stop stop_token_ids stream structured_outputs "
    "temperature top_k top_p"
)
_TEXT = _SAMPLING | _names(
    "add_special_tokens allowed_token_ids bad_words logprobs max_tokens min_tokens model n response_format "
    "return_token_ids return_token_offsets return_tokens_as_token_ids spaces_between_special_tokens "
    "stream_interval stream_options truncate_prompt_tokens truncation_side"
)
SERVED: Mapping[str, frozenset[str]] = {
    COMPLETIONS: _TEXT | {"echo", "prompt", "suffix"},
    CHAT: _TEXT
    | _names(
        "add_generation_prompt chat_template chat_template_kwargs continue_final_message documents "
        "include_reasoning max_completion_tokens media_io_kwargs messages mm_processor_kwargs "
        "parallel_tool_calls reasoning_effort return_prompt_text tool_choice tools top_logprobs"
    ),
    RESPONSES: _SAMPLING
    | _names(
        "chat_template_kwargs enable_response_messages include include_reasoning input instructions "
        "max_output_tokens media_io_kwargs mm_processor_kwargs model parallel_tool_calls reasoning text "
        "tool_choice tools top_logprobs truncation"
    ),
}
"""Fields that the gateway heeds, or that vLLM's server refuses by itself where it cannot."""
_IGNORED = WITHOUT_EFFECT | {"session_id"}  # the latter says which requests share a cache
_IDLE: Mapping[str, Any] = {
    "audio": None,
    "best_of": 1,
    "conversation": None,
    "function_call": "none",
    "functions": None,
    "modalities": ["text"],
    "prediction": None,
    "verbosity": "medium",
}
"""Fields of OpenAI's that vLLM does not know, with the value that asks for nothing."""
_EMPTY: tuple[object, ...] = (None, False, "", [], {})
_PARTS: Mapping[str, frozenset[str]] = {
    "stream_options": frozenset({"include_usage", "continuous_usage_stats", "include_obfuscation"}),
    "structured_outputs": _names(
        "choice disable_additional_properties disable_any_whitespace grammar json json_object regex "
        "structural_tag whitespace_pattern"
    ),
}
"""Names within fields, where a misspelt one would be left out in silence."""
_SHAPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "messages": ((list,), "must be a list"),
    "stream_options": ((dict, NoneType), "must be an object"),
    "structured_outputs": ((dict, NoneType), "must be an object"),
    "tools": ((list, NoneType), "must be a list"),
}
"""Fields that vLLM's own checks look into, whatever they are."""
_INCLUDED = ("message.output_text.logprobs", "reasoning.encrypted_content")
"""The latter asks for reasoning in a closed form: the answer has it in the open."""
_TOOL_TYPES = ("function", "custom")
_NOT_OFFERED = "is not offered by this server"


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyFields:
    """Fields of one path's body: those that are served, and the defaults of all others that vLLM knows."""

    served: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def vllm_bodies() -> dict[str, Any]:
    """The pydantic models that vLLM's server reads bodies with, by path."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    return {CHAT: ChatCompletionRequest, COMPLETIONS: CompletionRequest, RESPONSES: ResponsesRequest}


def described(path: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a body without the fields that are refused."""
    told = SERVED[path] | _IGNORED
    properties = {name: said for name, said in schema["properties"].items() if name in told}
    return {**schema, "properties": properties, "additionalProperties": False}


def fields_of_vllm(path: str, kind: Any) -> BodyFields:
    """Of one of those models."""
    defaults = {
        name: told.default
        for attribute, told in kind.model_fields.items()
        for name in (attribute, told.alias)
        if name is not None
    }
    return BodyFields(served=SERVED[path], defaults=defaults)


def check_fields(path: str, body: Mapping[str, Any], known: BodyFields) -> None:
    """InvalidRequest names the first field that would be left out, unless it asks for nothing."""
    for name, value in body.items():
        if name in known.served or name in _IGNORED:
            continue
        idle = _IDLE.get(name, known.defaults.get(name))
        if name not in known.defaults and name not in _IDLE:
            raise InvalidRequest("unknown field", field=printable(name))
        if value not in _EMPTY and value != idle:
            raise InvalidRequest(_NOT_OFFERED, field=name)
    for name, (shape, told) in _SHAPES.items():
        if name in body and not isinstance(body[name], shape):
            raise InvalidRequest(told, field=name)
    for name, parts in _PARTS.items():
        for part in body.get(name) or ():
            if part not in parts:
                raise InvalidRequest("unknown field", field=printable(f"{name}.{part}"))
    _CHECKS[path](body)


def _check_completion(body: Mapping[str, Any]) -> None:
    if body.get("echo") and body.get("logprobs") is not None:
        raise InvalidRequest(f"{_NOT_OFFERED} together with logprobs: a prompt has none", field="echo")


def _check_chat(body: Mapping[str, Any]) -> None:
    for index, message in enumerate(_listed(body.get("messages"))):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if not isinstance(calls, list | NoneType):
            raise InvalidRequest("must be a list", field=f"messages.{index}.tool_calls")


def _check_response(body: Mapping[str, Any]) -> None:
    for value in _listed(body.get("include")):
        if value not in _INCLUDED:
            raise InvalidRequest(f"{_NOT_OFFERED}: {printable(str(value))}", field="include")
    for index, tool in enumerate(_listed(body.get("tools"))):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind not in _TOOL_TYPES:
            raise InvalidRequest(f"{_NOT_OFFERED}: {printable(kind)}", field=f"tools.{index}.type")
    text = body.get("text")
    if isinstance(text, dict) and text.get("verbosity") not in (None, "medium"):
        raise InvalidRequest(_NOT_OFFERED, field="text.verbosity")


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    COMPLETIONS: _check_completion,
    CHAT: _check_chat,
    RESPONSES: _check_response,
}
