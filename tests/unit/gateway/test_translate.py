"""vLLM's parameters as ours and back in the worker; tokens of the queue as output of vLLM's engine core."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.translate import core_output, options_of
from l4queue.client.arguments import build_spec
from l4queue.errors import InvalidRequest
from l4queue.models import RequestBody
from l4queue.protocol.records import TokenLogprobs
from workers.engine.base import EngineRequest
from workers.engine.vllm.translate import sampling_params

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]
GIVEN: dict[str, Any] = {
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "seed": 11,
    "stop_token_ids": [5, 6],
    "ignore_eos": True,
    "presence_penalty": 0.25,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "logprobs": 3,
    "logit_bias": {17: 1.5, 5: -100.0},
    "allowed_token_ids": [5, 17],
    "bad_words": ["never", "no way"],
}


def test_what_is_asked_for_reaches_the_engine() -> None:
    """Each parameter through our options, the stored body and the worker, as it was."""
    from vllm import SamplingParams

    asked = SamplingParams(**GIVEN, stop=["x"], skip_special_tokens=False)
    params = build_spec(token_ids=[1], **options_of(asked)).params
    stored = RequestBody.stored(RequestBody(params=params).model_dump_json(exclude_defaults=True)).params
    assert stored == params
    assert (params.stop, params.skip_special_tokens) == (("x",), False)
    request = EngineRequest(request_id="a", token_ids=[1], max_tokens=7, min_tokens=2, params=stored)
    computed = sampling_params(request)
    for name in GIVEN:
        assert getattr(computed, name) == getattr(asked, name), name
    assert stored.is_pinned


def test_defaults_ask_for_nothing() -> None:
    """vLLM's defaults are ours, but for the length."""
    from vllm import SamplingParams

    params = build_spec(token_ids=[1], **options_of(SamplingParams(max_tokens=None))).params
    assert params.model_dump(exclude_defaults=True) == {}


@pytest.mark.parametrize(
    ("constraint", "stored"),
    [
        ({"json_object": True}, {"json": {"type": "object"}}),
        ({"json": '{"type": "object"}'}, {"json": '{"type": "object"}'}),
        ({"regex": "[ab]"}, {"regex": "[ab]"}),
        ({"choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"grammar": "root ::= [ab]"}, {"grammar": "root ::= [ab]"}),
        ({"structural_tag": "{}"}, {"structural_tag": "{}"}),
    ],
)
def test_constraints_are_ours(constraint: dict[str, Any], stored: dict[str, Any]) -> None:
    """Of the kinds that the queue has."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    asked = SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))
    assert options_of(asked)["structured_outputs"] == stored


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"extra_args": {"a": 1}}, "extra_args"),
        ({"logprob_token_ids": [1], "logprobs": 1}, "logprob_token_ids"),
    ],
)
def test_other_options_are_named(given: dict[str, Any], field: str) -> None:
    """Nothing that was asked for is left out in silence."""
    from vllm import SamplingParams

    with pytest.raises(InvalidRequest) as refused:
        options_of(SamplingParams(**given))
    assert refused.value.field == field


def test_output_is_that_of_an_engine_core() -> None:
    """Ids, each token's logprob before the most probable ones, its rank, and the end."""
    rows = [
        TokenLogprobs(token_id=4, logprob=-1.5, top=((9, -0.5), (4, -1.5))),
        TokenLogprobs(token_id=7, logprob=-4.0, top=((9, -0.5), (4, -1.5))),
    ]
    output = core_output("a", [4, 7], rows, ends=("stop", 7))
    assert (output.new_token_ids, output.finish_reason.name, output.stop_reason) == ([4, 7], "STOP", 7)
    ids, values, ranks, _ = output.new_logprobs
    assert ids.tolist() == [[4, 9, 4], [7, 9, 4]]
    assert values.tolist() == [[-1.5, -0.5, -1.5], [-4.0, -0.5, -1.5]]
    assert ranks.tolist() == [2, 3]
