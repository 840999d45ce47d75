"""Requests in the terms of `/v1/completions`, and events as vLLM 0.32 has sent them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from l4queue.models import SamplingParams
from workers.engine.base import EngineOutput, EngineRequest, FinishReason
from workers.engine.http.translate import BrokenEvent, completion_body, output_of

CHOICE = {
    "index": 0,
    "text": "es",
    "logprobs": None,
    "finish_reason": None,
    "stop_reason": None,
    "prompt_token_ids": None,
    "token_ids": [432],
}
LOGPROBS = {
    "text_offset": [11],
    "token_logprobs": [-0.5],
    "tokens": ["token_id:432"],
    "top_logprobs": [{"token_id:432": -0.5, "token_id:76": -0.25, "token_id:7": -9999.0}],
}


def event(**changes: Any) -> dict[str, Any]:
    """An event with one choice."""
    return {"id": "cmpl-1", "object": "text_completion", "choices": [CHOICE | changes]}


def request(**params: Any) -> EngineRequest:
    """A request that has been resumed."""
    return EngineRequest(
        request_id="r:2",
        token_ids=[5, 6, 7],
        max_tokens=9,
        min_tokens=2,
        params=SamplingParams.model_validate(params),
        priority=-3,
        num_resumed=1,
    )


def test_a_body_says_all_that_a_server_would_choose_by_itself() -> None:
    """It takes lengths of the rest of the output, and leaves out what is not asked for."""
    body = completion_body(request(), model="m")
    assert json.loads(json.dumps(body)) == {
        "model": "m",
        "prompt": [5, 6, 7],
        "request_id": "r:2",
        "priority": -3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "stop_token_ids": [],
        "ignore_eos": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "bad_words": [],
    }


@pytest.mark.parametrize(
    ("params", "more"),
    [
        ({"seed": 3}, {"seed": 3}),
        ({"logprobs": 0}, {"logprobs": 0, "return_tokens_as_token_ids": True}),
        ({"logit_bias": {4: 1.5}}, {"logit_bias": {"4": 1.5}}),
        ({"allowed_token_ids": [1, 2]}, {"allowed_token_ids": [1, 2]}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"structured_outputs": {"choice": ["a", "b"]}}),
        (
            {"structured_outputs": {"json": {"type": "object"}}},
            {"structured_outputs": {"json": {"type": "object"}}},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"structured_outputs": {"regex": "a+"}}),
    ],
)
def test_a_body_has_what_was_asked_for(params: dict[str, Any], more: dict[str, Any]) -> None:
    assert completion_body(request(**params), model="m") == completion_body(request(), model="m") | more


@pytest.mark.parametrize(
    ("changes", "reason", "error"),
    [
        ({}, None, None),
        ({"finish_reason": "stop", "token_ids": [1]}, FinishReason.STOP, None),
        ({"finish_reason": "length"}, FinishReason.LENGTH, None),
        ({"finish_reason": "repetition"}, FinishReason.STOP, None),
        ({"finish_reason": "abort", "token_ids": []}, FinishReason.LOST, None),
        ({"finish_reason": "melted"}, FinishReason.ERROR, "the server ended it: melted"),
    ],
)
def test_an_event_is_tokens_and_perhaps_an_end(
    changes: dict[str, Any], reason: FinishReason | None, error: str | None
) -> None:
    expected = tuple((CHOICE | changes)["token_ids"])  # type: ignore[arg-type]
    assert output_of("r", event(**changes), num_top=None) == EngineOutput(
        request_id="r", token_ids=expected, finish_reason=reason, error=error
    )


def test_logprobs_are_in_order_and_as_many_as_were_asked_for() -> None:
    """vLLM names the token itself first, whatever its rank."""
    output = output_of("r", event(logprobs=LOGPROBS), num_top=2)
    assert output is not None
    (row,) = output.logprobs
    assert (row.token_id, row.logprob, row.top) == (432, -0.5, ((76, -0.25), (432, -0.5)))
    alone = output_of("r", event(logprobs=LOGPROBS), num_top=0)
    assert alone is not None
    assert alone.logprobs[0].top == ()


@pytest.mark.parametrize("nothing", [{"choices": []}, event(token_ids=[])])
def test_an_event_without_tokens_adds_nothing(nothing: dict[str, Any]) -> None:
    """Of usage, and of text that was held back."""
    assert output_of("r", nothing, num_top=None) is None


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({}, "choices"),
        ({"choices": [{"index": 0, "text": "es", "finish_reason": None}]}, "token_ids"),
        (event(token_ids=None), "NoneType"),
        (event(token_ids=["432"]), "not all numbers"),
        (event(token_ids=[True]), "not all numbers"),
        (event(), "NoneType"),
        (event(logprobs=LOGPROBS | {"tokens": ["es"]}), "no token id"),
        (event(logprobs=LOGPROBS, token_ids=[432, 433]), "logprobs of 1 tokens beside 2"),
    ],
)
def test_what_is_no_event_of_token_ids_is_told(broken: dict[str, Any], says: str) -> None:
    """Text without token ids must not pass for an output without tokens."""
    with pytest.raises(BrokenEvent, match=says):
        output_of("r", broken, num_top=1)
