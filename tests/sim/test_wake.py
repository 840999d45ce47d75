"""Who takes an arrival: the lightest of the engines with room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.cost.step import StepCost
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.wake import backlog_of, woken_of

COST = StepCost(alpha_ms=7.0, beta_ms=0.02, gamma_ms=0.0, pi_ms=0.01, psi_ms=0.0)


def _engines(*pending_tokens: int) -> list[Instance]:
    """With prompts of these lengths before them: 10 ms for each 1,000 tokens."""
    engines = [Instance(index, cost=COST) for index in range(len(pending_tokens))]
    for engine, tokens in zip(engines, pending_tokens, strict=True):
        if tokens:
            engine.push(SimRequest(engine.index, 0.0, prompt_tokens=tokens, output_tokens=1))
    return engines


def test_of_equals_the_first_is_woken() -> None:
    engines = _engines(1000, 500, 500)
    assert woken_of(engines, has_room=lambda engine: True) is engines[1]


@given(st.lists(st.tuples(st.integers(0, 4000), st.booleans()), max_size=8))
def test_the_lightest_of_those_with_room_is_woken(given_engines: list[tuple[int, bool]]) -> None:
    """None where none has room."""
    engines = _engines(*(tokens for tokens, _ in given_engines))
    able = [engine for engine, (_, has_room) in zip(engines, given_engines, strict=True) if has_room]

    woken = woken_of(engines, has_room=lambda engine: engine in able)

    assert woken is min(able, key=backlog_of, default=None)
