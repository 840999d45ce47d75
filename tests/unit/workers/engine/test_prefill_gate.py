"""Who waits for a long prompt's prefill, against a plain list of everybody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.models import SamplingParams
from workers.engine.base import EngineRequest
from workers.engine.vllm.prefill_gate import PrefillGate

CHUNK, LEFT = 24, 4  # tokens of a step for the long prompt, and those that it leaves
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrives"), st.integers(1, 40), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("over"), st.integers(0, 60), st.just(0), st.just(False)),
    ),
    max_size=60,
)


def request(name: str, *, num_tokens: int, priority: int = 0, kv: str = "") -> EngineRequest:
    """A request of which only the length counts."""
    return EngineRequest(
        request_id=name,
        token_ids=range(num_tokens),
        max_tokens=1,
        min_tokens=0,
        params=SamplingParams(),
        priority=priority,
        kv=kv,
    )


@given(EVENTS)
def test_beside_a_prompt_of_many_steps_there_is_none_but_short_ones(
    events: list[tuple[str, int, int, bool]],
) -> None:
    """Short ones and those with their KV never wait; the others begin in order, up to the next long one."""
    turns = PrefillGate(max_batched_tokens=CHUNK + LEFT, max_chunk_tokens=CHUNK)
    long_one = ""
    waiting: list[tuple[int, int, str, int]] = []
    for number, (what, value, priority, has_kv) in enumerate(events):
        if what == "arrives":
            one = request(str(number), num_tokens=value, priority=priority, kv="ticket" if has_kv else "")
            must_wait = bool(long_one) and value > 2 * LEFT and not has_kv
            assert turns.arrived(one) != must_wait
            if must_wait:
                waiting.append((priority, number, one.request_id, value))
            elif value > CHUNK and not has_kv:
                long_one = one.request_id
        else:
            following = [one.request_id for one in turns.over(str(value))]
            waiting = sorted(entry for entry in waiting if entry[2] != str(value))
            expected: list[str] = []
            if str(value) == long_one:
                long_one = ""
                while waiting and not long_one:
                    *_, name, length = waiting.pop(0)
                    expected.append(name)
                    long_one = name if length > CHUNK else ""
            assert following == expected
        assert len(turns) == len(waiting)


def test_prompts_that_fit_a_step_are_prefilled_together() -> None:
    """Batches of prompts are not taken apart: without one of many steps nobody waits."""
    turns = PrefillGate(max_batched_tokens=CHUNK + LEFT, max_chunk_tokens=CHUNK)
    assert all(turns.arrived(request(str(index), num_tokens=CHUNK)) for index in range(10))


def test_before_the_engine_says_its_limits_everything_takes_turns() -> None:
    """Limits of zero: one prompt at a time."""
    turns = PrefillGate(max_batched_tokens=0, max_chunk_tokens=0)
    assert turns.arrived(request("a", num_tokens=1))
    assert not turns.arrived(request("b", num_tokens=1))
    assert [one.request_id for one in turns.over("a")] == ["b"]
