"""Whatever `enqueue` accepts can be stored, read, answered and repeated; all else is refused with its field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings

from l4queue.client.arguments import build_spec, spec_of
from l4queue.client.core import ClientCore, Prepared
from l4queue.config import Settings
from l4queue.errors import InvalidRequest
from l4queue.models import (
    MAX_METADATA_BYTES,
    ChatMessage,
    RequestBody,
    RequestSpec,
    RequestState,
    SamplingParams,
)
from l4queue.protocol.records import RequestRecord
from l4queue.sampling import MAX_SCHEMA_CHARS
from tests.property.requests import BODIES, nested, shuffled

COMPOSER = ClientCore(Settings(namespace="t"))


def prepared(spec: RequestSpec) -> tuple[Prepared, dict[str, Any]]:
    """What is sent for a request, by the names of the script's arguments."""
    found = COMPOSER.prepare(spec)
    names = (
        "id",
        "digest",
        "body",
        "kind",
        "prompt",
        "tokens",
        "bytes",
        "live_tokens",
        "live_bytes",
        "deadline_ms",
    )
    sent = dict(
        zip(
            (*names, "ttl_ms", "client", "canonical", "key_ttl_ms", "open_end", "greatest_id"),
            found.call.args,
            strict=True,
        )
    )
    return found, sent


@settings(deadline=None, max_examples=200)
@given(BODIES)
@example({"prompt": "a", "metadata": {"\ud800": 1}})
@example({"prompt": "a", "metadata": {"a": "\ud800"}})
@example({"prompt": "a", "stop": ["\ud800"]})
@example({"prompt": "a", "structured_outputs": {"choice": ["\ud800"]}})
@example({"prompt": "a", "structured_outputs": {"json": '{"a": "\ud800"}'}})
@example({"prompt": "a", "metadata": nested(200, "object")})
@example({"prompt": "a", "temperature": 10**400})
@example({"prompt": "a", "deadline_s": 1e-300})
@example({"prompt": "a", "metadata": {"b": {"d": 1, "c": [{"f": 1, "e": 2}]}, "a": 1e16}, "idempotency_key": "k"})
@example({"prompt": "a", "structured_outputs": {"json": {"b": 1, "a": 2}}, "idempotency_key": "k"})
def test_what_is_accepted_travels_unchanged_and_is_the_same_again(body: dict[str, Any]) -> None:
    """Refused: InvalidRequest that names a field and can be printed. Accepted: read as it was written."""
    try:
        spec = build_spec(**body)
        call, sent = prepared(spec)
    except InvalidRequest as refusal:
        _check_is_told(refusal)
        return
    wire = RequestBody.model_validate_json(sent["body"])
    assert (wire.params, wire.priority, wire.metadata) == (spec.params, spec.priority, spec.metadata)
    record = RequestRecord(request_id=call.request_id, state=RequestState.DONE, body=sent["body"])
    assert COMPOSER.result(record, []).metadata == body.get("metadata")
    assert spec.deadline_s is None or sent["deadline_ms"] > 0

    _, again = prepared(build_spec(**body))
    _, other = prepared(build_spec(**{name: shuffled(value) for name, value in body.items()}))
    assert again["digest"] == sent["digest"]
    assert other["canonical"] == sent["canonical"]
    assert other["digest"] == sent["digest"] or sent["canonical"]
    if spec.idempotency_key is not None:
        assert again["id"] == sent["id"]


def _check_is_told(refusal: InvalidRequest) -> None:
    assert refusal.field
    assert len(str(refusal).encode()) < 2000


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"metadata": {"a": "x" * MAX_METADATA_BYTES}}, "metadata"),
        ({"metadata": nested(65, "object")}, "metadata"),
        ({"metadata": {"a": 2**64}}, "metadata"),
        pytest.param({"metadata": {"a": 10**5000}}, "metadata", id="5001 digits"),
        pytest.param({"metadata": nested(100_000, "object")}, "metadata", id="100,000 levels"),
        ({"metadata": {"a": -(2**63) - 1}}, "metadata"),
        ({"metadata": {"a": float("nan")}}, "metadata"),
        ({"metadata": {"a": ("t",)}}, "metadata"),
        ({"metadata": {1: 1}}, "metadata"),
        ({"metadata": {"\ud800": 1}}, "metadata"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids.0"),
        ({"top_k": 2**31}, "top_k"),
        ({"min_tokens": 1_000_001}, "min_tokens"),
        ({"structured_outputs": {"choice": ["a\ud800"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a\0"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"a": "\0"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"a": "x" * MAX_SCHEMA_CHARS}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"a": 1, "a": 2}'}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"a": 1e999}'}}, "structured_outputs.json"),
        ({"idempotency_key": "\ud800"}, "idempotency_key"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * (16 * 2**20 + 1)}, "prompt"),
        ({"prompt": None, "messages": [{"role": "user", "content": "\0" * (3 * 2**20)}]}, "messages"),
    ],
)
def test_each_bound_names_its_field(body: dict[str, Any], field: str) -> None:
    """As the user wrote it."""
    with pytest.raises(InvalidRequest) as caught:
        build_spec(**{"prompt": "a", **body})
    assert caught.value.field == field


def test_values_at_their_bounds_are_accepted() -> None:
    """The largest metadata, the deepest, the widest integers."""
    room = MAX_METADATA_BYTES - len('{"a":""}')
    for metadata in ({"a": "x" * room}, nested(64, "object"), {"a": [2**64 - 1, -(2**63), 1e308, "\0"]}):
        spec = build_spec("a", metadata=metadata)
        assert RequestBody.model_validate_json(prepared(spec)[1]["body"]).metadata == metadata


def test_the_schema_of_a_request_has_its_bounds() -> None:
    """For whoever validates before sending."""
    schema = RequestSpec.model_json_schema()
    params = schema["$defs"]["SamplingParams"]["properties"]
    assert params["stop"]["items"] == {"type": "string", "minLength": 1, "maxLength": 256}
    assert (params["stop"]["maxItems"], params["top_k"]["exclusiveMaximum"]) == (16, 2**31)
    assert str(MAX_METADATA_BYTES) in schema["properties"]["metadata"]["description"]
    assert str(MAX_SCHEMA_CHARS) in json.dumps(schema["$defs"]["StructuredOutputs"]["properties"]["json"])


def test_a_request_that_was_changed_behind_its_checks_is_refused() -> None:
    """A dictionary that a specification holds is still the caller's."""
    metadata: dict[str, Any] = {}
    spec = build_spec("a", metadata=metadata)
    assert spec.metadata is not None
    spec.metadata["a"] = "\ud800"
    with pytest.raises(InvalidRequest) as caught:
        COMPOSER.prepare(spec)
    assert caught.value.field == "request"


@pytest.mark.parametrize("request_", [5, None, b"a", ["a"], {1: 2}])
def test_an_element_of_many_that_is_no_request_is_refused(request_: Any) -> None:
    """Before any of them is sent."""
    with pytest.raises(InvalidRequest) as caught:
        spec_of(request_, {})
    assert caught.value.field == "request"


def test_a_prompt_of_its_own_counts_more_than_a_common_one() -> None:
    """However it is given."""
    assert spec_of("a", {"prompt": "b"}) == spec_of({"prompt": "a"}, {"prompt": "b"}) == build_spec("a")


@pytest.mark.parametrize("request_", [{"prompt": "a", "": 1}, {"": 1}])
def test_a_parameter_without_a_name_is_named_all_the_same(request_: dict[str, Any]) -> None:
    """A field is never empty."""
    with pytest.raises(InvalidRequest) as caught:
        spec_of(request_, {})
    assert (caught.value.field, str(caught.value)) == ("''", "'': unknown parameter")


UNCHECKED = RequestSpec.model_construct


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (UNCHECKED(), "request"),
        (UNCHECKED(prompt=5), "prompt"),
        (UNCHECKED(prompt="a", token_ids=(1,)), "request"),
        (UNCHECKED(token_ids=[-1]), "token_ids"),
        (UNCHECKED(messages=(ChatMessage.model_construct(role=5, content=6),)), "messages.0.role"),
        (UNCHECKED(prompt="a", params=None), "params"),
        (UNCHECKED(prompt="a", params=SamplingParams.model_construct(max_tokens=-5)), "params.max_tokens"),
        (UNCHECKED(prompt="a", metadata={1: 2}), "metadata"),
        (UNCHECKED(prompt="a", deadline_s=float("inf")), "deadline_s"),
        (UNCHECKED(prompt="a", traceparent="\ud800"), "traceparent"),
        (build_spec("a").model_copy(update={"priority": 10**30}), "priority"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_specification_that_was_never_checked_is_checked(spec: RequestSpec, field: str) -> None:
    """Before it is sent: nobody could serve it."""
    with pytest.raises(InvalidRequest) as caught:
        spec_of(spec, {})
    assert caught.value.field == field


def test_a_specification_is_the_same_after_its_check() -> None:
    """With all that it may hold."""
    options: dict[str, Any] = {"stop": "a", "structured_outputs": {"json": {"b": [1]}}, "metadata": {"c": {}}}
    for spec in (build_spec("a", **options), build_spec(messages=[{"role": "user", "content": "x"}])):
        assert spec_of(spec, {}) == spec
