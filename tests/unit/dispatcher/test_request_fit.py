"""How many tokens a request may generate, and what the body says that workers read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.routing.request_fit import Fitted, fit, read_body
from dispatcher.routing.tokenizer import Refusal
from l4queue.models import RequestBody
from l4queue.protocol.reads import InboxBody
from l4queue.sampling import MAX_LOGPROBS

LIMIT, VOCABULARY = 1000, 100


def fitted(prompt_tokens: int, *, is_left_out: bool, limit: int = LIMIT, **params: Any) -> Fitted | Refusal:
    """Of a request as it lies in Redis."""
    data = json.dumps({"params": params, "metadata": {"a": 1}, "priority": 3}).encode()
    wire = read_body(data)
    assert isinstance(wire, RequestBody)
    body = InboxBody(state="submitted", kind="p", prompt=b"", body=data, submitted_ms=0, has_open_end=is_left_out)
    return fit(wire, body, prompt_tokens, limit_tokens=limit, vocabulary_size=VOCABULARY)


@settings(deadline=None)
@given(prompt_tokens=st.integers(1, LIMIT - 1), logprobs=st.none() | st.integers(0, 20))
def test_a_left_out_max_tokens_is_what_still_fits(prompt_tokens: int, logprobs: int | None) -> None:
    """Every worker reads it in the body, where all the rest is as it was; admission counts a usual output."""
    more = {} if logprobs is None else {"logprobs": logprobs}
    found = fitted(prompt_tokens, is_left_out=True, temperature=0.5, **more)

    assert isinstance(found, Fitted)
    assert found.max_tokens == LIMIT - prompt_tokens
    assert found.charge_tokens == prompt_tokens + min(256, LIMIT - prompt_tokens)
    assert json.loads(found.body) == {
        "params": {"temperature": 0.5, **more, "max_tokens": LIMIT - prompt_tokens},
        "metadata": {"a": 1},
        "priority": 3,
    }


def test_all_logprobs_of_a_request_are_bounded_also_then() -> None:
    """A model with more room than that."""
    found = fitted(1, is_left_out=True, limit=500_000, logprobs=20)
    assert isinstance(found, Fitted)
    assert found.max_tokens == MAX_LOGPROBS // 21


def test_a_client_of_the_earlier_release_leaves_out_its_default() -> None:
    """It means 256, and its body stays as it is."""
    assert fitted(10, is_left_out=False) == Fitted(max_tokens=256, charge_tokens=266)
    assert fitted(10, is_left_out=False, max_tokens=40) == Fitted(max_tokens=40, charge_tokens=50)
    assert fitted(10, is_left_out=True, max_tokens=40) == Fitted(max_tokens=40, charge_tokens=50)


def test_a_stop_token_outside_the_vocabulary_is_refused() -> None:
    """As vLLM does it in the worker."""
    assert isinstance(fitted(10, is_left_out=True, stop_token_ids=[0, VOCABULARY - 1]), Fitted)
    found = fitted(10, is_left_out=True, stop_token_ids=[VOCABULARY, 1])
    assert isinstance(found, Refusal)
    assert (found.field, found.reason) == ("stop_token_ids", "invalid")


@pytest.mark.parametrize(
    ("prompt_tokens", "is_left_out", "params", "field"),
    [
        (LIMIT, True, {}, "prompt"),
        (LIMIT, False, {"max_tokens": 1}, "prompt"),
        (LIMIT - 9, False, {"max_tokens": 10}, "max_tokens"),
        (LIMIT - 9, False, {}, "max_tokens"),
        (LIMIT - 9, True, {"min_tokens": 10}, "min_tokens"),
    ],
)
def test_what_cannot_fit_names_the_field(
    prompt_tokens: int, is_left_out: bool, params: dict[str, Any], field: str
) -> None:
    """Too long by a token."""
    found = fitted(prompt_tokens, is_left_out=is_left_out, **params)
    assert isinstance(found, Refusal)
    assert (found.field, found.reason) == (field, "too_long")
