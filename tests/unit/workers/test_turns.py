"""Who waits for a long prompt's prefill, against a plain list of everybody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.models import SamplingParams
from workers.engine import EngineRequest
from workers.turns import PrefillTurns

LEFT = 8  # tokens of a step that the long prompt leaves
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrives"), st.integers(1, 40), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("over"), st.integers(0, 60), st.just(0), st.just(False)),
    ),
    max_size=60,
)


def request(name: str, *, num_tokens: int, priority: int = 0, kv: str = "") -> EngineRequest:
    """A request of which only the length counts."""
    ids = range(num_tokens)
    return EngineRequest(
        request_id=name,
        token_ids=ids,
        max_tokens=1,
        min_tokens=0,
        params=SamplingParams(),
        priority=priority,
        kv=kv,
    )


@given(STEPS)
def test_one_long_prompt_at_a_time_in_order(steps: list[tuple[str, int, int, bool]]) -> None:
    """Short ones and those with their KV never wait; of the long ones the first in order has the turn."""
    turns = PrefillTurns(max_batched_tokens=128, max_chunk_tokens=128 - LEFT)
    inside: set[str] = set()
    waiting: list[tuple[int, int, str]] = []
    for number, (what, value, priority, has_kv) in enumerate(steps):
        if what == "arrives":
            one = request(str(number), num_tokens=value, priority=priority, kv="ticket" if has_kv else "")
            is_long = value > 2 * LEFT and not has_kv
            assert turns.arrived(one) == (not is_long or not inside)
            if is_long and not inside:
                inside = {one.request_id}
            elif is_long:
                waiting.append((priority, number, one.request_id))
        else:
            following = turns.over(str(value))
            waiting = [entry for entry in waiting if entry[2] != str(value)]
            if str(value) in inside:
                inside = {waiting.pop(waiting.index(min(waiting)))[2]} if waiting else set()
                assert {following.request_id} == inside if following else not inside
            else:
                assert following is None
        assert len(turns) == len(waiting)


def test_an_engine_whose_prompt_leaves_nothing_has_one_prompt_at_a_time() -> None:
    """The limits of an engine that is not started: everything takes turns."""
    turns = PrefillTurns(max_batched_tokens=0, max_chunk_tokens=0)
    assert turns.arrived(request("a", num_tokens=1))
    assert not turns.arrived(request("b", num_tokens=1))
    following = turns.over("a")
    assert following is not None
    assert following.request_id == "b"
