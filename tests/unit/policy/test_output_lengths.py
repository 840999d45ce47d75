"""Expected remaining output against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.policy.output_lengths import OutputLengths

LENGTHS = st.lists(st.integers(0, 60), max_size=40)


@given(lengths=LENGTHS, generated=st.integers(0, 70), size=st.integers(1, 50))
def test_expected_remaining_is_the_mean_over_those_that_got_further(
    lengths: list[int], generated: int, size: int
) -> None:
    """Of the latest `size` outputs; zero when none got further."""
    outputs = OutputLengths(size=size)
    outputs.add(lengths)
    known = lengths[-size:]
    assert len(outputs) == len(known)
    longer = [length - generated for length in known if length > generated]
    if known:
        expected = sum(longer) / len(longer) if longer else 0.0
        assert abs(outputs.expected_remaining(generated) - expected) < 1e-9
        assert abs(outputs.mean_tokens - sum(known) / len(known)) < 1e-9


def test_what_may_still_be_generated_is_a_limit() -> None:
    """`max_tokens` less what there is."""
    outputs = OutputLengths()
    assert outputs.expected_remaining(0, limit=7) == 7.0
    outputs.add([100])
    assert outputs.expected_remaining(10, limit=20) == 20.0
    assert outputs.expected_remaining(10) == 90.0
    assert outputs.expected_remaining(100) == 0.0
