"""What a request may ask for, and what it is told when it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from l4queue.client.arguments import build_spec
from l4queue.errors import InvalidRequest
from l4queue.models import RequestBody, SamplingParams
from l4queue.protocol.records import TokenLogprobs, pack_logprobs, unpack_logprobs
from l4queue.sampling import MAX_SCHEMA_CHARS, NOT_OFFERED

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def nested(levels: int) -> dict[str, Any]:
    """A schema of so many objects, one in another."""
    return {"not": nested(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("n", "enqueue it n times"),
        ("best_of", "logprobs"),
        ("echo", "the client has"),
    ],
)
def test_a_well_known_parameter_that_is_not_offered_says_what_to_do(name: str, words: str) -> None:
    """By the client as the field at fault, and by the model itself."""
    with pytest.raises(InvalidRequest, match=words) as caught:
        build_spec("a", **{name: 2})
    assert caught.value.field == name
    with pytest.raises(ValidationError, match=f"{name}: .*{words}"):
        SamplingParams.model_validate({name: 2})


def test_nothing_that_is_offered_is_said_not_to_be() -> None:
    """The two lists are disjoint; other names are unknown."""
    assert not NOT_OFFERED.keys() & SamplingParams.model_fields.keys()
    with pytest.raises(InvalidRequest, match="unknown parameter"):
        build_spec("a", max_tokenz=3)


@pytest.mark.parametrize(
    "given",
    [{"json": PERSON}, {"json": json.dumps(PERSON)}, {"regex": "[0-9]{4}"}, {"choice": ["yes", "no"]}],
)
def test_a_constraint_pins_and_travels_as_it_was_given(given: dict[str, Any]) -> None:
    """Through JSON, under vLLM's names."""
    params = build_spec("a", structured_outputs=given).params
    body = RequestBody(params=params).model_dump_json(exclude_defaults=True)

    assert json.loads(body) == {"params": {"structured_outputs": given}}
    assert RequestBody.model_validate_json(body).params == params
    assert params.is_pinned
    assert not SamplingParams().is_pinned


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"choice": []}, "at least 1"),
        ({"choice": [""]}, "1 to 1000"),
        ({"choice": ["x" * 1001]}, "1 to 1000"),
        ({"regex": "a\0"}, "NUL"),
        ({"regex": "a" * 4097}, "4096"),
        ({"json": "{"}, "not JSON"),
        ({"json": "[]"}, "must be a JSON object"),
        ({"json": json.dumps("x" * MAX_SCHEMA_CHARS)}, "at most 65536"),
        ({"json": nested(66)}, "deeper than 64"),
        ({"grammar": ""}, "at least 1"),
        ({"grammar": "a" * (MAX_SCHEMA_CHARS + 1)}, "at most 65536"),
        ({"grammar": "root ::= 'a'", "regex": "a"}, "exactly one"),
        ({"structural_tag": "[]"}, "must be a JSON object"),
        ({"structural_tag": {"a": "x" * MAX_SCHEMA_CHARS}}, "65536"),
        ({"json_object": True}, "unknown parameter"),
    ],
)
def test_a_constraint_that_cannot_be_one_is_refused(given: dict[str, Any], words: str) -> None:
    """Before anything is sent; the field is named."""
    with pytest.raises(InvalidRequest, match=words) as caught:
        build_spec("a", structured_outputs=given)
    assert caught.value.field.startswith("structured_outputs")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"logprobs": -1}, "greater than"),
        ({"logprobs": 21}, "less than"),
        ({"logprobs": True}, "integer"),
        ({"logprobs": 20, "max_tokens": 49_933}, "at most of 49932"),
    ],
)
def test_logprobs_are_bounded(given: dict[str, Any], words: str) -> None:
    """In number for each token, and in all."""
    with pytest.raises(InvalidRequest, match=words):
        build_spec("a", **given)
    assert build_spec("a", logprobs=20, max_tokens=49_932).params.logprobs == 20
    assert build_spec("a", logprobs=0, max_tokens=1_000_000).params.logprobs == 0


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_packed_logprobs_are_the_same_again(num_top: int) -> None:
    """Ids exactly, values as floats of 32 bits; 8 bytes each."""
    rows = tuple(
        TokenLogprobs(token_id=2**32 - 1 - i, logprob=-i / 8, top=tuple((k, -k / 2) for k in range(num_top)))
        for i in range(5)
    )
    data = pack_logprobs(rows)

    assert len(data) == 5 * (num_top + 1) * 8
    assert unpack_logprobs(data, 5) == rows


def test_logprobs_that_cannot_be_are_errors() -> None:
    """Rows of different lengths, bytes that are not whole rows."""
    rows = [TokenLogprobs(token_id=1, logprob=0.0), TokenLogprobs(token_id=1, logprob=0.0, top=((1, 0.0),))]
    with pytest.raises(ValueError, match="differ in length"):
        pack_logprobs(rows)
    for data, num_tokens in ((b"x" * 12, 1), (b"x" * 8, 2), (b"x" * 8, 0)):
        with pytest.raises(ValueError, match="not the logprobs"):
            unpack_logprobs(data, num_tokens)


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_tokens": 1}])
def test_a_constraint_ends_the_output_itself(more: dict[str, Any]) -> None:
    """What would have it go on behind its end is refused."""
    assert build_spec("a", structured_outputs={"json": nested(64)}, stop=["x"]).params.is_pinned
    with pytest.raises(InvalidRequest, match="end by themselves"):
        build_spec("a", structured_outputs={"choice": ["a"]}, **more)
