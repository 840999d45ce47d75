"""Logprobs from vLLM's own container, as the sampler fills it and as put together from several steps."""

from __future__ import annotations

from typing import Any

import pytest

from workers.engine.vllm.logprobs import token_logprobs

pytestmark = pytest.mark.vllm

STEPS = [
    (7, [(7, -0.1, 1), (7, -0.1, 1), (3, -2.0, 2)]),
    (5, [(5, -4.0, 9), (7, -0.2, 1), (3, -2.0, 2)]),
    (3, [(3, float("-inf"), 2), (7, -0.3, 1), (3, float("-inf"), 2)]),
]
"""Of each step the sampled token and what the sampler tells: it, and the two most probable."""


def flat(steps: list[list[tuple[int, float, int]]]) -> Any:
    """vLLM's container of these positions."""
    from vllm.logprobs import FlatLogprobs

    found = FlatLogprobs()
    for rows in steps:
        tokens, values, ranks = zip(*rows, strict=True)
        found.append_fast(list(tokens), list(values), iter(ranks), [None] * len(rows))
    return found


def test_outputs_that_vllm_put_together_tell_the_same_as_each_alone() -> None:
    alone = [token_logprobs(flat([rows]), [token], num_top=2)[0] for token, rows in STEPS]
    together = flat([STEPS[0][1]])
    for _, rows in STEPS[1:]:
        together.extend(flat([rows]))

    assert token_logprobs(together, [token for token, _ in STEPS], num_top=2) == tuple(alone)
    assert [row.token_id for row in alone] == [7, 5, 3]
    assert [row.logprob for row in alone] == [-0.1, -4.0, -9999.0]
    assert [row.top for row in alone] == [
        ((7, -0.1), (3, -2.0)),
        ((7, -0.2), (3, -2.0)),
        ((7, -0.3), (3, -9999.0)),
    ]


def test_without_top_the_token_stands_alone() -> None:
    (row,) = token_logprobs(flat([[(5, -4.0, 9)]]), [5], num_top=0)

    assert (row.token_id, row.logprob, row.top) == (5, -4.0, ())
