"""Lines of a batch file: what becomes a request, and what is refused with the name of the field."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.client.arguments import WITHOUT_EFFECT
from l4queue.client.batch.lines import CHAT_URL, COMPLETIONS_URL, BatchLine, object_of, parse_line
from l4queue.errors import InvalidRequest
from l4queue.models import SamplingParams

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def parse(line: Any, *, max_tokens: int | None = 7, priority: int = 100) -> BatchLine:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    return parse_line(raw, max_tokens=max_tokens, priority=priority, idempotency_key="k")


def body(**fields: Any) -> dict[str, Any]:
    return {"custom_id": "a", "body": {**CHAT, **fields}}


def test_a_chat_line_is_a_request_with_the_defaults_of_the_batch() -> None:
    """What the body leaves open comes from the batch; the key is the one given."""
    line = parse({"custom_id": "a", "method": "POST", "url": CHAT_URL, "body": {**CHAT, "model": "m"}})

    assert (line.custom_id, line.url, line.model) == ("a", CHAT_URL, "m")
    assert line.spec.messages is not None
    assert [(m.role, m.content) for m in line.spec.messages] == [("user", "hi")]
    assert (line.spec.params.max_tokens, line.spec.priority, line.spec.idempotency_key) == (7, 100, "k")


@pytest.mark.parametrize(
    ("prompt", "text", "token_ids"),
    [("x", "x", None), (["x"], "x", None), ([1, 2], None, (1, 2)), ([[1, 2]], None, (1, 2)), ([5], None, (5,))],
)
def test_a_completion_line_has_one_prompt(prompt: Any, text: str | None, token_ids: Any) -> None:
    """As text, as token ids, or as a list of one of them; without a URL the body tells."""
    line = parse({"custom_id": "a", "body": {"prompt": prompt}})
    assert (line.url, line.spec.prompt, line.spec.token_ids) == (COMPLETIONS_URL, text, token_ids)


def test_the_parameters_of_both_apis_are_passed_on() -> None:
    """Whole numbers do for fractions, one stop string for a list; null is as good as absent."""
    line = parse(
        body(
            max_completion_tokens=9, temperature=0, top_p=1, stop="\n", seed=3, frequency_penalty=1, top_k=4,
            priority=-5, n=1, stream=False, logprobs=None, user="u", response_format={"type": "text"}, tools=[],
        )
    )  # fmt: skip

    params = line.spec.params
    assert (params.max_tokens, params.temperature, params.top_p, params.stop) == (9, 0.0, 1.0, ("\n",))
    assert (params.seed, params.frequency_penalty, params.top_k, line.spec.priority) == (3, 1.0, 4, -5)


def test_what_http_ignores_is_ignored_here_too() -> None:
    """One grammar: the fields are those of the gateway."""
    assert {"store", "metadata", "service_tier", "user", "prompt_cache_key"} <= WITHOUT_EFFECT
    line = parse(body(**{name: {"a": [1]} for name in WITHOUT_EFFECT}, max_completion_tokens=5, max_tokens=9))
    assert line.spec.params == SamplingParams(max_tokens=5)


TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "a"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.mark.parametrize(
    ("given", "constraint"),
    [
        ({"type": "text"}, None),
        (None, None),
        ({"type": "json_object"}, {"json": {"type": "object"}}),
        (
            {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": SCHEMA}},
            {"json": SCHEMA},
        ),
        (TAG, {"structural_tag": TAG}),
    ],
)
def test_a_response_format_is_a_constraint(given: Any, constraint: Any) -> None:
    """JSON of any kind is an object; a name and `strict` change nothing."""
    params = parse(body(response_format=given)).spec.params
    assert params == SamplingParams(max_tokens=7, structured_outputs=constraint)


@pytest.mark.parametrize(
    ("line", "logprobs"),
    [
        (body(logprobs=True), 0),
        (body(logprobs=True, top_logprobs=5), 5),
        (body(logprobs=False, top_logprobs=0), None),
        ({"custom_id": "a", "body": {"prompt": "x", "logprobs": 3}}, 3),
        ({"custom_id": "a", "body": {"prompt": "x", "logprobs": 0}}, 0),
        ({"custom_id": "a", "body": {"prompt": "x", "logprobs": None}}, None),
    ],
)
def test_logprobs_are_asked_for_as_in_each_api(line: Any, logprobs: int | None) -> None:
    """A chat says whether and how many others; a completion says how many."""
    assert parse(line).spec.params.logprobs == logprobs


def test_biases_have_ids_as_keys() -> None:
    """JSON has texts only."""
    assert parse(body(logit_bias={"12": -100, "3": 1.5})).spec.params.logit_bias == {3: 1.5, 12: -100.0}


def test_an_answer_can_be_a_message_again() -> None:
    """Its empty fields ask for nothing."""
    answer = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": [], "annotations": []}
    line = parse({"custom_id": "a", "body": {"messages": [answer]}})
    assert line.spec.messages is not None
    assert line.spec.messages[0].content == "hi"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "c"}]}, "messages.0.tool_call_id"),
    ],
)
def test_tools_are_refused_with_the_place_that_has_them(fields: Any, field: str) -> None:
    """A client has no parsers; a gateway has."""
    with pytest.raises(InvalidRequest, match="--gateway URL") as caught:
        parse(body(**fields))
    assert caught.value.field == field


def test_text_parts_of_a_message_are_joined() -> None:
    """Other parts cannot be computed."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    line = parse({"custom_id": "a", "body": {"messages": [{"role": "user", "content": parts}]}})
    assert line.spec.messages is not None
    assert line.spec.messages[0].content == "a\nb"


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"nonsense", "line"),
        (b"[1]", "line"),
        (b'{"custom_id": "\xff"}', "line"),
        (b"[" * 100_000, "line"),
        ({"body": CHAT}, "custom_id"),
        ({"custom_id": 5, "body": CHAT}, "custom_id"),
        ({"custom_id": "", "body": CHAT}, "custom_id"),
        (b'{"custom_id": "\\ud800", "body": {"prompt": "x"}}', "custom_id"),
        ({"custom_id": "a"}, "body"),
        ({"custom_id": "a", "method": "GET", "body": CHAT}, "method"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "x"}}, "url"),
        ({"custom_id": "a", "url": CHAT_URL, "body": {}}, "messages"),
        ({"custom_id": "a", "url": CHAT_URL, "body": {**CHAT, "prompt": "x"}}, "prompt"),
        ({"custom_id": "a", "body": {"prompt": ["x", "y"]}}, "prompt"),
        ({"custom_id": "a", "body": {"prompt": [True]}}, "prompt"),
        ({"custom_id": "a", "body": {"prompt": ""}}, "prompt"),
        ({"custom_id": "a", "body": {"messages": ["x"]}}, "messages.0"),
        ({"custom_id": "a", "body": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}},
         "messages.0.content"),
        ({"custom_id": "a", "body": {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}},
         "messages.0.tool_calls"),
        (body(n=2), "n"),
        (body(stream=True), "stream"),
        (body(tools=[{}]), "tools"),
        (body(temperature="hot"), "temperature"),
        (body(max_tokens=0), "max_tokens"),
        (body(max_tokens=True), "max_tokens"),
        (body(nonsense=1), "nonsense"),
        (body(idempotency_key="mine"), "idempotency_key"),
        (body(temperature=10**400), "temperature"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "temperature": ' + b"9" * 5000 + b"}}", "temperature"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "seed": ' + b"9" * 5000 + b"}}", "seed"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "temperature": NaN}}', "temperature"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "temperature": 1e999}}', "temperature"),
        (body(stop="\ud800"), "stop"),
        (body(model="\ud800"), "model"),
        (body(model=[[1]]), "model"),
        (body(model="m" * 513), "model"),
        (body(n=True), "n"),
        (body(response_format="json"), "response_format"),
        (body(response_format={"type": "grammar"}), "response_format"),
        (body(response_format={"type": "json_schema"}), "response_format.json_schema.schema"),
        (body(response_format={"type": "json_schema", "json_schema": {"schema": "x"}}),
         "response_format.json_schema.schema"),
        (body(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}), "response_format"),
        (body(logprobs=2), "logprobs"),
        (body(top_logprobs=2), "top_logprobs"),
        (body(logprobs=True, top_logprobs=21), "top_logprobs"),
        (body(logprobs=True, top_logprobs=True), "top_logprobs"),
        ({"custom_id": "a", "body": {"prompt": "x", "logprobs": True}}, "logprobs"),
        ({"custom_id": "a", "body": {"prompt": "x", "logprobs": 1, "top_logprobs": 1}}, "top_logprobs"),
        (body(logit_bias={"x": 1}), "logit_bias.x"),
        (body(stream=0), "stream"),
        ({"custom_id": "a", "url": [], "body": CHAT}, "url"),
        ({"custom_id": "a", "body": {"prompt": "\ud800"}}, "prompt"),
        (body(**{"\ud800": 1}), "\\ud800"),
        (b'{"custom_id": "a", "custom_id": "b", "body": {"prompt": "x"}}', "line"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "prompt": "y"}}', "line"),
        (b'{"custom_id": "a", "metadata": ' + b"[" * 70 + b"]" * 70 + b', "body": {"prompt": "x"}}', "line"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_names_its_field(line: Any, field: str) -> None:
    """One bad line says what is wrong with it."""
    with pytest.raises(InvalidRequest) as caught:
        parse(line)
    assert caught.value.field == field


def test_an_answer_belongs_to_a_request_not_to_its_spelling() -> None:
    """Other spaces and another order of keys are the same line; any other value is another one."""
    line = {"custom_id": "a", "method": "POST", "body": {"prompt": "x", "temperature": 0, "max_tokens": 5}}
    same = b'{ "body": {"max_tokens":5, "temperature":0,"prompt":"\\u0078"}, "method":"POST","custom_id":"a"}\r\n'
    digest = parse(line).digest

    assert len(digest) == 40
    assert parse(same, max_tokens=99).digest == digest
    for other in ({"prompt": "y"}, {"temperature": 1}, {"max_tokens": 6}, {"max_tokens": None}, {"user": "u"}):
        assert parse({**line, "body": {**line["body"], **other}}).digest != digest  # type: ignore[dict-item]


def test_the_default_of_the_batch_counts_for_lines_without_their_own() -> None:
    """The answer depends on it then."""
    assert parse(body(), max_tokens=7).digest == parse(body(), max_tokens=7, priority=5).digest
    assert parse(body(), max_tokens=7).digest != parse(body(), max_tokens=8).digest
    own = body(max_completion_tokens=3)
    assert parse(own, max_tokens=7).digest == parse(own, max_tokens=8).digest


@given(st.binary(max_size=60) | st.from_type(dict).map(lambda d: repr(d).encode()))
def test_no_line_does_worse_than_be_refused(raw: bytes) -> None:
    """Whatever stands in the file."""
    with suppress(InvalidRequest):
        assert object_of(raw).custom_id == parse(raw).custom_id


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ("messages", "prompt", "temperature", "stop", "n", "tools", "logit_bias", "model", "seed", "logprobs",
     "response_format")
)  # fmt: skip


@given(st.dictionaries(NAMES, JSON), st.none() | JSON | st.sampled_from((CHAT_URL, COMPLETIONS_URL)))
def test_no_body_does_worse_than_be_refused(fields: dict[str, Any], url: Any) -> None:
    """A valid line around anything."""
    with suppress(InvalidRequest):
        assert parse({"custom_id": "a", "url": url, "body": fields}).custom_id == "a"


def test_without_any_max_tokens_a_line_gets_what_still_fits() -> None:
    """The dispatcher decides it; a null says as little as nothing."""
    for more in ({}, {"max_tokens": None}):
        line = {"custom_id": "a", "body": {"prompt": "x", **more}}
        assert parse(line, max_tokens=None).spec.params.max_tokens is None
        assert parse(line, max_tokens=7).spec.params.max_tokens == 7


@pytest.mark.parametrize(
    ("name", "idle", "wanted"),
    [
        ("chat_template_kwargs", {}, {"enable_thinking": False}),
        ("documents", [], [{"text": "x"}]),
        ("add_generation_prompt", True, False),
        ("continue_final_message", False, True),
    ],
)
def test_options_of_the_chat_template_are_sent_to_the_gateway(name: str, idle: Any, wanted: Any) -> None:
    """What a client's library writes without a wish changes nothing."""
    assert parse(body(**{name: idle})).spec == parse(body()).spec
    with pytest.raises(InvalidRequest, match="--gateway URL") as caught:
        parse(body(**{name: wanted}))
    assert caught.value.field == name
