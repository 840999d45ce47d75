"""Fields of bodies at the door: served, or refused by name, and none left out in silence."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.fields import CHAT, COMPLETIONS, RESPONSES, SERVED, BodyFields, check_fields, fields_of_vllm
from l4queue.errors import InvalidRequest

pytestmark = [pytest.mark.vllm]
NOT_SERVED = frozenset(
    {
        "cache_salt",
        "ec_transfer_params",
        "kv_transfer_params",
        "length_penalty",
        "logprob_token_ids",
        "mm_payload",
        "prompt_logprobs",
        "repetition_detection",
        "return_mm_kwargs",
        "routed_experts_prompt_start",
        "thinking_token_budget",
        "use_beam_search",
        "vllm_xargs",
        "watermarking",
    }
)
OF_RESPONSES = frozenset(
    {"background", "max_tool_calls", "previous_input_messages", "previous_response_id", "prompt"}
)
IGNORED = frozenset({"session_id", "user"})


def known(path: str) -> BodyFields:
    """Of vLLM's own models."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    kinds = {CHAT: ChatCompletionRequest, COMPLETIONS: CompletionRequest, RESPONSES: ResponsesRequest}
    return fields_of_vllm(path, kinds[path])


@pytest.mark.parametrize(
    ("path", "more", "ignored"),
    [
        (COMPLETIONS, {"prompt_embeds"}, set()),
        (CHAT, {"echo"}, set()),
        (RESPONSES, OF_RESPONSES, {"metadata", "prompt_cache_key", "service_tier", "store"}),
    ],
)
def test_every_field_of_vllm_has_its_place(path: str, more: set[str], ignored: set[str]) -> None:
    """A new one of a later vLLM is refused, and fails here, until somebody decides about it."""
    names = set(known(path).defaults)
    refused = (NOT_SERVED & names) | more
    assert names == SERVED[path] | refused | (IGNORED & names) | ignored
    for name in refused:
        with pytest.raises(InvalidRequest) as told:
            check_fields(path, {name: "something"}, known(path))
        assert told.value.field == name


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"temprature": 0}, "temprature"),
        (CHAT, {"best_of": 3}, "best_of"),
        (CHAT, {"functions": [{"name": "a"}]}, "functions"),
        (CHAT, {"length_penalty": 2.0}, "length_penalty"),
        (CHAT, {"stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        (CHAT, {"structured_outputs": {"regex": "a", "grammer": "b"}}, "structured_outputs.grammer"),
        (COMPLETIONS, {"echo": True, "logprobs": 1}, "echo"),
        (COMPLETIONS, {"use_beam_search": True}, "use_beam_search"),
        (COMPLETIONS, {"messages": []}, "messages"),
        (RESPONSES, {"tools": [{"type": "function"}, {"type": "web_search"}]}, "tools.1.type"),
        (RESPONSES, {"include": ["file_search_call.results"]}, "include"),
        (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity"),
        (RESPONSES, {"background": True}, "background"),
    ],
)
def test_the_field_at_fault_is_named(path: str, body: dict[str, Any], field: str) -> None:
    """Also one within another."""
    with pytest.raises(InvalidRequest) as told:
        check_fields(path, body, known(path))
    assert told.value.field == field


def test_what_is_empty_or_the_default_asks_for_nothing() -> None:
    """Clients write out what they leave as it is."""
    idle: dict[str, Any] = {
        "best_of": 1,
        "cache_salt": None,
        "function_call": "none",
        "length_penalty": 1,
        "metadata": {"a": "b"},
        "mm_payload": "tensors",
        "modalities": ["text"],
        "stream_options": None,
        "use_beam_search": False,
    }
    check_fields(CHAT, idle, known(CHAT))
    check_fields(RESPONSES, {"background": False, "include": None, "tools": [], "text": None}, known(RESPONSES))
