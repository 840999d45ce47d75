"""Blocks that a worker believes to hold: the latest, each with those before it; news give the same to others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.policy.prefix_blocks import BLOCK_TOKENS, block_keys
from workers.loop.held_blocks import HeldBlocks

TEXTS = st.lists(st.lists(st.sampled_from([1, 2]), min_size=0, max_size=6), max_size=12)


def keys_of(text: list[int]) -> list[bytes]:
    """Keys of a prompt with one block for each number."""
    return block_keys([token for token in text for _ in range(BLOCK_TOKENS)])


@given(texts=TEXTS, capacity=st.integers(0, 10))
def test_the_latest_blocks_are_held(texts: list[list[int]], capacity: int) -> None:
    """Of a text its beginning is the latest; a block is never there without those before it."""
    held = HeldBlocks(capacity)
    order: list[bytes] = []
    for text in texts:
        keys = keys_of(text)
        held.use(keys)
        order = [*keys, *(key for key in order if key not in keys)][:capacity]
        assert len(held) == len(order)
        for other in texts:
            found = held.num_leading(keys_of(other))
            assert [key in order for key in keys_of(other)] == [n < found for n in range(len(other))]


@given(texts=TEXTS, capacity=st.integers(0, 10), told_after=st.sets(st.integers(0, 12)))
def test_news_tell_what_is_there(texts: list[list[int]], capacity: int, told_after: set[int]) -> None:
    """The first are all there is, as after a lost lease; without a change there are none."""
    held, known = HeldBlocks(capacity), set[bytes]()
    for number, text in enumerate(texts):
        held.use(keys_of(text))
        if number not in told_after:
            continue
        if number % 5 == 4:
            held.forgotten()
        if (news := held.news()) is not None:
            known = (set() if news.is_all else known - set(news.removed)) | set(news.added)
            held.told(news)
        assert known == set(held._blocks)
        assert held.news() is None
