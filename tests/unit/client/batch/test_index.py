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


PROVED = st.tuples(st.sampled_from("abcxyz"), st.integers(1, 3))


@given(st.lists(PROVED, max_size=12), st.lists(PROVED, max_size=12), st.lists(PROVED, max_size=12))
def test_an_answer_without_the_proof_of_its_line_finishes_nothing(
    lines: list[tuple[str, int]], out: list[tuple[str, int]], errors: list[tuple[str, int]]
) -> None:
    """It is told by its place among those that were added; either of a line's proofs is enough."""
    index = LineIndex(num_proofs=2)
    for custom_id, proof in lines:
        index.add(custom_id, proofs=(proof, proof + 10))
    for custom_id, proof in out:
        index.add_finished(custom_id, LineState.SUCCEEDED, proof=proof)
    for custom_id, proof in errors:
        index.add_finished(custom_id, LineState.FAILED, proof=proof + 10)
    assert all(index.has_proof(n, p) and index.has_proof(n, p + 10) for n, (_, p) in enumerate(lines, 1))
    assert not index.has_proof(0, 1)
    assert not index.has_proof(len(lines) + 1, 1)
    strays = index.resolve(reported=[0, len(lines) + 1])

    firsts: dict[str, int] = {}
    for custom_id, proof in lines:
        firsts.setdefault(custom_id, proof)
    right = [[firsts.get(custom_id) == proof for custom_id, proof in answers] for answers in (out, errors)]
    assert strays.succeeded == tuple(i for i, is_right in enumerate(right[0]) if not is_right)
    assert strays.failed == tuple(i for i, is_right in enumerate(right[1]) if not is_right)
    assert strays.reported == (0, len(lines) + 1)
    finished = {a for (a, _), ok in zip(out + errors, right[0] + right[1], strict=True) if ok}
    states = (LineState.SUCCEEDED, LineState.FAILED)
    assert sum(index.count(state) for state in states) == len(finished)
