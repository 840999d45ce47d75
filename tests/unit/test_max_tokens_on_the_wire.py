"""What clients write of `max_tokens`: read by dispatchers and workers of this release and of the one before."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from l4queue.client.arguments import build_spec
from l4queue.client.core import ClientCore
from l4queue.config import Settings
from l4queue.protocol.calls import Arg

BODY, CHARGE, OPEN_END = 2, 5, 14
"""Places among the arguments of `submit`."""


def submitted(**options: Any) -> tuple[Arg, ...]:
    """The arguments of the call for a request with a key."""
    core = ClientCore(Settings(namespace="test"))
    return core.prepare(build_spec("x" * 40, idempotency_key="k", **options)).call.args


def earlier_digest(body: str) -> str:
    """As the release before made it, which never wrote a `max_tokens` of 256."""
    return hashlib.sha256(f"p\0{body}\0".encode() + b"x" * 40).hexdigest()


@pytest.mark.parametrize(
    ("options", "body", "digested", "charge", "open_end"),
    [
        ({}, {}, {}, 11 + 256, 1),
        ({"max_tokens": None}, {}, {}, 11 + 256, 1),
        ({"max_tokens": 256}, {"params": {"max_tokens": 256}}, {}, 11 + 256, 0),
        ({"max_tokens": 7}, {"params": {"max_tokens": 7}}, {"params": {"max_tokens": 7}}, 11 + 7, 0),
        (
            {"max_tokens": 256, "top_k": 4},
            {"params": {"max_tokens": 256, "top_k": 4}},
            {"params": {"top_k": 4}},
            11 + 256,
            0,
        ),
    ],
)
def test_a_number_is_written_and_a_left_out_one_is_marked(
    options: dict[str, Any], body: dict[str, Any], digested: dict[str, Any], charge: int, open_end: int
) -> None:
    """The digest does not change with the release: the same request stays the same."""
    args = submitted(**options)

    assert json.loads(str(args[BODY])) == body
    assert (args[CHARGE], args[OPEN_END]) == (charge, open_end)
    if "top_k" not in options:
        assert args[1] == earlier_digest(json.dumps(digested, separators=(",", ":")))
    assert args[1] == submitted(**options)[1]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"top_k": -1}, {}),
        ({"seed": -1}, {}),
        ({"stop": "\n"}, {"stop": ["\n"]}),
        ({"stop": ["a"], "stop_token_ids": None}, {"stop": ["a"]}),
        ({"temperature": 0}, {"temperature": 0.0}),
    ],
)
def test_other_spellings_of_vllm_are_written_as_the_release_before_reads_them(
    given: dict[str, Any], written: dict[str, Any]
) -> None:
    """It knows one spelling of each."""
    body = json.loads(str(submitted(max_tokens=3, **given)[BODY]))
    del body["params"]["max_tokens"]
    assert body["params"] == written
