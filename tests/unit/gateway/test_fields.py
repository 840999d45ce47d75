"""Fields of bodies at the door: served, or refused by name, and none left out in silence."""

from __future__ import annotations

import itertools
import json
import math
from contextlib import suppress
from typing import Any

import pytest

from gateway.fields import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    SERVED,
    BodyFields,
    check_fields,
    described,
    fields_of_vllm,
    vllm_bodies,
)
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


def kind(path: str) -> Any:
    """vLLM's own model."""
    return vllm_bodies()[path]


def known(path: str) -> BodyFields:
    """The fields of that model."""
    return fields_of_vllm(path, kind(path))


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


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
def test_the_description_has_what_is_taken(path: str) -> None:
    """Clients that are generated from it send no field that is refused."""
    schema = described(path, kind(path).model_json_schema())
    assert SERVED[path] <= set(schema["properties"])
    assert not schema["additionalProperties"]
    for name in schema["properties"]:
        with suppress(InvalidRequest):
            check_fields(path, {name: "something"}, known(path))
            continue
        assert name in SERVED[path]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"temprature": 0}, "temprature"),
        (CHAT, {"best_of": 3}, "best_of"),
        (CHAT, {"functions": [{"name": "a"}]}, "functions"),
        (CHAT, {"length_penalty": 2.0}, "length_penalty"),
        (CHAT, {"stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        (CHAT, {"structured_outputs": {"regex": "a", "grammer": "b"}}, "structured_outputs.grammer"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages.0.tool_calls"),
        (COMPLETIONS, {"structured_outputs": ["a"]}, "structured_outputs"),
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


CALLS = [5, [5], [{"function": 5}]]
ODD: list[Any] = [
    *(5, -1, 1.5, 10**30, math.nan, True, False, None, "", "x", [], {}, [5], ["a"], [[]], [None], [{}], {"a": 1}),
    *({"type": kind} for kind in ("x", 5, None, "json_schema", "structural_tag", "function")),
    *({"type": "json_schema", "json_schema": 5}, {"type": "structural_tag", "format": 5}, {"format": {"type": 5}}),
    *({"type": "structural_tag", "structures": [5], "triggers": ["a"]}, {"type": "function", "function": 5}),
    *([{"type": kind}] for kind in (5, "function", "function_call", "message")),
    *([{"type": "function", "function": value}] for value in (5, {"name": 5})),
    *([{"role": "assistant", "tool_calls": calls}] for calls in CALLS),
    *(
        [{"role": 5}],
        [{"role": "user"}],
        [{"type": "message", "content": 5}],
        [{"type": "reasoning", "content": 5}],
    ),
    *({"json": 5}, {"json": []}, {"structural_tag": 5}, {"structural_tag": "[]"}, {"structural_tag": "{}"}),
    *({"regex": 5}, {"choice": 5}, {"json_object": "x"}, {"effort": 5}),
]
"""Values of all shapes, right for one field at most."""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "a", "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
        (CHAT, {"messages": [], "tools": [{"type": "function", "function": {"name": "w"}}]}),
        (RESPONSES, {"input": "a"}),
    ],
)
def test_no_shape_of_a_field_breaks_vllms_checks(path: str, body: dict[str, Any]) -> None:
    """They refuse it as a fault of the request, which is a 400; anything else would be a 500."""
    from vllm.exceptions import VLLMClientError

    for name, value in itertools.product(SERVED[path], ODD):
        with suppress(InvalidRequest, ValueError, VLLMClientError):
            check_fields(path, {**body, name: value}, known(path))
            kind(path).model_validate(json.loads(json.dumps({**body, name: value})))
