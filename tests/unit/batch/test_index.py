"""The index of a batch's lines against a plain dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.client.batch.index import LineIndex, LineState

IDS = st.sampled_from("abcdefg") | st.none() | st.just("")  # None: no usable custom_id; "": an empty line


@given(st.lists(IDS, max_size=30), st.lists(st.sampled_from("abcdxyz")), st.lists(st.sampled_from("abefxyz")),
       st.sets(st.integers(-1, 35)))  # fmt: skip
def test_every_line_is_in_the_state_that_the_files_say(
    ids: list[str | None], out: list[str], errors: list[str], reported: set[int]
) -> None:
    """The first of equal custom_ids counts, success more than failure; nothing is reported twice."""
    index = LineIndex()
    for custom_id in ids:
        index.add(custom_id or None, is_empty=custom_id == "")
    for custom_id in out:
        index.add_finished(custom_id, LineState.SUCCEEDED)
    for custom_id in errors:
        index.add_finished(custom_id, LineState.FAILED)
    index.resolve(reported=reported)

    firsts: dict[str, int] = {}
    for number, custom_id in enumerate(ids, 1):
        if custom_id == "":
            expected = LineState.EMPTY
        elif custom_id is None:
            expected = LineState.FAILED if number in reported else LineState.INVALID
        elif firsts.setdefault(custom_id, number) != number:
            expected = LineState.FAILED if number in reported else LineState.DUPLICATE
            assert index.first_of(number) == firsts[custom_id]
        elif custom_id in out:
            expected = LineState.SUCCEEDED
        else:
            expected = LineState.FAILED if custom_id in errors else LineState.OPEN
        assert index.state(number) is expected
    assert len(index) == len(ids)
    assert sum(index.count(state) for state in LineState) == len(ids)


def test_a_marked_line_counts_in_its_new_state() -> None:
    """Numbers start at 1."""
    index = LineIndex()
    for custom_id in ("a", "b"):
        index.add(custom_id)
    index.resolve()
    index.mark(2, LineState.SUCCEEDED)
    assert [index.state(n) for n in (1, 2)] == [LineState.OPEN, LineState.SUCCEEDED]
    assert (index.count(LineState.OPEN), index.count(LineState.SUCCEEDED)) == (1, 1)
