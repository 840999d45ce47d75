"""Growth counts: every token is counted once, whatever happens to a batch on its way."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from l4queue.planning.histogram import Buckets, growth_fields
from workers.loop.growth import GrowthCounts

MAX_LEN = 256


def test_an_unanswered_batch_is_repeated_as_it_was() -> None:
    counts = GrowthCounts(max_model_len=MAX_LEN)
    counts.add(from_tokens=10, to_tokens=12)
    first = counts.batch()
    counts.add(from_tokens=12, to_tokens=20)
    assert counts.batch() == first
    counts.answered(is_counted=True)
    sequence, fields = counts.batch()
    assert sequence == first[0] + 1
    assert sum(n for name, n in fields.items() if name.startswith("d:")) == 8


@given(
    rounds=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 100), st.integers(1, 50)), max_size=3),
            st.sampled_from(["counted", "refused", "no answer"]),
        ),
        max_size=12,
    )
)
def test_what_redis_counts_is_what_grew(rounds: list[tuple[list[tuple[int, int]], str]]) -> None:
    """Redis counts a number once: a batch whose answer was lost has been counted. Its repeat is not refused."""
    counts, grown, counted = GrowthCounts(max_model_len=MAX_LEN), Counter[str](), Counter[str]()
    seen = 0
    for additions, fate in [*rounds, ([], "counted"), ([], "counted")]:
        for start, steps in additions:
            counts.add(from_tokens=start, to_tokens=start + steps)
            buckets = Buckets.log_spaced(MAX_LEN)
            grown.update(growth_fields(buckets, from_tokens=start, to_tokens=start + steps))
        sequence, fields = counts.batch()
        if fate != "refused" and sequence > seen:
            counted.update(fields)
            seen = sequence
        if fate != "no answer":
            counts.answered(is_counted=fate == "counted" or sequence == seen)
    assert +counted == +grown
