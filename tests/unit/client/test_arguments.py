"""Arguments of `enqueue`: values of other libraries, sampling parameters in one value, names that are wrong."""

from __future__ import annotations

import json
from array import array
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from l4queue import Client, Settings
from l4queue.client.arguments import build_spec, checked_patience, id_in_queue
from l4queue.client.batch.lines import parse_line
from l4queue.client.batch.options import batch_options
from l4queue.client.core import ClientCore
from l4queue.errors import InvalidRequest
from l4queue.models import RequestSpec, SamplingParams

MESSAGE = {"role": "user", "content": "hi"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"max_tokens": np.int64(3)}, {"max_tokens": 3}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"top_p": Fraction(1, 2)}, {"top_p": 0.5}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ("a", "b")}, {"stop": ["a", "b"]}),
        ({"stop": np.array(["a", "b"])}, {"stop": ["a", "b"]}),
        ({"stop_token_ids": np.array([1, 2])}, {"stop_token_ids": [1, 2]}),
        ({"structured_outputs": {"choice": np.array(["a"])}}, {"structured_outputs": {"choice": ["a"]}}),
        ({"priority": np.int8(2), "deadline_s": np.float64(3)}, {"priority": 2, "deadline_s": 3.0}),
        ({"params": SamplingParams(max_tokens=3, stop="a")}, {"max_tokens": 3, "stop": ["a"]}),
        ({"params": {"max_tokens": 3}, "max_tokens": 4}, {"max_tokens": 4}),
        ({"params": {"max_tokens": 3}, "max_tokens": None}, {"max_tokens": 3}),
    ],
)
def test_values_of_other_libraries_are_plain_ones(given: dict[str, Any], plain: dict[str, Any]) -> None:
    """The same request, under the same key."""
    assert build_spec("x", **given) == build_spec("x", **plain)


@pytest.mark.parametrize(
    "token_ids", [(1, 2, 3), range(1, 4), np.array([1, 2, 3]), [1, np.uint32(2), 3], array("I", [1, 2, 3])]
)
def test_token_ids_come_in_any_sequence(token_ids: Any) -> None:
    """An array is not read number by number."""
    assert build_spec(token_ids=token_ids) == build_spec(token_ids=[1, 2, 3])


@pytest.mark.parametrize(
    ("given", "field", "told"),
    [
        ({"max_token": 3}, "max_token", "did you mean max_tokens?"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"Stop": "a"}, "Stop", "did you mean stop?"),
        ({"max_completion_tokens": 3}, "max_completion_tokens", "is called max_tokens"),
        ({"timeout": 3}, "timeout", "result()"),
        ({"zzz": 3}, "zzz", "unknown parameter"),
        ({"params": {"max_token": 3}}, "max_token", "did you mean max_tokens?"),
        ({"params": 3}, "params", "SamplingParams"),
        ({"stop": {"a"}}, "stop", "must be a text, or a list of texts"),
        ({"stop": ["a"] * 17}, "stop", "must have at most 16 items, not 17"),
        ({"tools": []}, "tools", "over HTTP"),
        ({"structured_outputs": {"choices": ["a"]}}, "structured_outputs.choices", "did you mean choice?"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": np.bool_(True)}, "max_tokens", "integer"),
        ({"max_tokens": np.float64(3)}, "max_tokens", "integer"),
        ({"temperature": Fraction(10**400)}, "temperature", "number"),
        ({"prompt": None, "token_ids": np.array([[1, 2]])}, "token_ids.0", "integer"),
        ({"prompt": None, "token_ids": np.array([True])}, "token_ids.0", "integer"),
        ({"prompt": None, "token_ids": LOOP}, "token_ids.0", "integer"),
        ({"prompt": None, "messages": "hi"}, "messages", "must be a list"),
        ({"prompt": None, "messages": [{"content": "hi"}]}, "messages.0.role", "is missing"),
        ({"prompt": None, "messages": [{"role": "user", "contents": ""}]}, "messages.0.content", "is missing"),
        ({"prompt": None, "messages": [{**MESSAGE, "contents": ""}]}, "messages.0.contents", "mean content?"),
        ({"prompt": None, "messages": [MESSAGE, IMAGE]}, "messages.1.content", "only parts of type text"),
        ({"prompt": ["a", "b"]}, "prompt", "enqueue_many"),
    ],
)
def test_a_wrong_argument_is_named(given: dict[str, Any], field: str, told: str) -> None:
    """With the right name, where there is one near."""
    with pytest.raises(InvalidRequest, match=r".*") as caught:
        build_spec(**{"prompt": "x", **given})
    assert caught.value.field == field
    assert told in str(caught.value)


def test_no_error_speaks_of_pydantic() -> None:
    """Its words are of inputs, tuples and validation; a caller gave none of these."""
    for wrong in (
        {"max_tokens": 0},
        {"stop": ["a"] * 17},
        {"metadata": 1},
        {"top_k": "a"},
        {"idempotency_key": ""},
    ):
        with pytest.raises(InvalidRequest, match=r"^\w+: must ") as caught:
            build_spec("x", **wrong)
        assert "validation" not in str(caught.value)


@pytest.mark.parametrize("given", ["hello", b"hello", {"prompt": "x"}, RequestSpec(prompt="x")])
def test_many_requests_are_not_the_parts_of_one(given: Any) -> None:
    """A text is no list of its characters, a request no list of its fields."""
    core = ClientCore(Settings())
    with pytest.raises(InvalidRequest, match=r"^requests: must be several") as caught:
        list(core.prepare_many(given, {}))
    assert caught.value.field == "requests"


def test_the_wrong_one_of_many_requests_is_told() -> None:
    """By its position, in the message and for programs."""
    client = Client("redis://127.0.0.1:1/0", settings=Settings(), timeout_s=0)
    with pytest.raises(InvalidRequest, match=r"^max_tokens: .* \(in requests\[2\]\)$") as caught:
        client.enqueue_many(["a", "b", {"prompt": "c", "max_tokens": 0}])
    assert (caught.value.field, caught.value.refused, caught.value.accepted) == ("max_tokens", (2,), ())


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("a1", "a1"),
        ("chatcmpl-a1", "a1"),
        ("cmpl-a1-1", "a1-1"),
        ("resp_a1", "a1"),
        ("chatcmpl-", ""),
        ("k-cmpl-", "k-cmpl-"),
    ],
)
def test_an_id_of_an_answer_is_that_of_the_queue(given: str, known: str) -> None:
    """Behind one prefix; an id of the queue has none."""
    assert id_in_queue(given) == known


def test_a_request_spec_stands_alone() -> None:
    """An option beside it would be lost."""
    spec = RequestSpec(prompt="x", params=SamplingParams(max_tokens=3))
    assert build_spec(spec) == spec
    with pytest.raises(InvalidRequest, match="max_tokens: belongs into the RequestSpec"):
        build_spec(spec, max_tokens=4)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "a", "name": "bob"}], "stop": "END", "top_k": -1},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ]
        },
        {"prompt": "x", "max_tokens": 3, "seed": 1},
    ],
)
def test_a_batch_reads_what_the_client_reads(body: dict[str, Any]) -> None:
    """One grammar."""
    line = json.dumps({"custom_id": "a", "body": body}).encode()
    assert parse_line(line, max_tokens=None, priority=0, idempotency_key="k").spec == build_spec(
        **body, idempotency_key="k"
    )


def test_options_of_a_batch_are_told_apart() -> None:
    """As those of a request."""
    with pytest.raises(InvalidRequest, match="did you mean max_in_flight"):
        batch_options("in", "out", max_inflight=3)


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), float("inf"), "1", True, None])
def test_patience_is_a_number_of_seconds(timeout_s: object) -> None:
    """0 is one try."""
    assert checked_patience(0) == 0.0
    assert checked_patience(np.float32(0.5)) == 0.5
    with pytest.raises(InvalidRequest, match="timeout_s"):
        checked_patience(timeout_s)
