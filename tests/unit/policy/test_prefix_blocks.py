"""Keys of blocks: equal exactly where all tokens up to there are; vLLM's chains part at the same places."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.policy.prefix_blocks import BLOCK_TOKENS, KEY_BYTES, block_keys, hash_ids

TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=4 * BLOCK_TOKENS)


def num_common(a: list[Any], b: list[Any]) -> int:
    """How many leading elements two lists share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(common=TOKENS, one=TOKENS, other=TOKENS)
def test_prompts_share_the_keys_of_full_blocks_that_they_share(
    common: list[int], one: list[int], other: list[int]
) -> None:
    a, b = common + one, common + other
    keys = block_keys(a)
    assert len(keys) == len(a) // BLOCK_TOKENS
    assert {len(key) for key in keys} <= {KEY_BYTES}
    assert num_common(keys, block_keys(b)) == num_common(a, b) // BLOCK_TOKENS


def test_what_differs_before_a_block_changes_its_key() -> None:
    """As in vLLM, a block is its tokens and all before them."""
    block = list(range(BLOCK_TOKENS))
    assert block_keys(block + block)[0] != block_keys(block + block)[1]
    assert block_keys([1, *block[1:], *block])[1] != block_keys(block + block)[1]


@pytest.mark.vllm
def test_vllm_parts_chains_where_we_do() -> None:
    """By its own function, with blocks as large as ours."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import hash_block_tokens, init_none_hash

    init_none_hash(sha256)

    def vllm_keys(ids: list[int]) -> list[Any]:
        keys: list[Any] = []
        for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            parent = keys[-1] if keys else None
            keys.append(hash_block_tokens(sha256, parent, ids[start : start + BLOCK_TOKENS], None))
        return keys

    text = [n * 7 % 5000 for n in range(5 * BLOCK_TOKENS + 9)]
    others = [[*text[:at], 9999, *text[at + 1 :]] for at in (0, BLOCK_TOKENS - 1, BLOCK_TOKENS, 400)]
    for other in [text, text[:300], *others]:
        assert num_common(vllm_keys(text), vllm_keys(other)) == num_common(block_keys(text), block_keys(other))
        assert len(vllm_keys(other)) == len(block_keys(other))


@given(prompt=TOKENS, most=st.integers(0, 5))
def test_the_first_keys_are_those_of_all(prompt: list[int], most: int) -> None:
    assert block_keys(prompt, most=most) == block_keys(prompt)[:most]


@given(common=TOKENS, one=TOKENS, other=TOKENS, most=st.integers(0, 5))
def test_equal_keys_get_equal_numbers_and_all_else_its_own(
    common: list[int], one: list[int], other: list[int], most: int
) -> None:
    """A number for each block, the last of fewer tokens too; beyond the keys that were told nothing is alike."""
    a, b = common + one, common + other
    known, numbers = dict[bytes, int](), count()
    ids = [hash_ids(b"".join(block_keys(p, most=most)), len(p), known=known, numbers=numbers) for p in (a, b)]
    assert [len(found) for found in ids] == [-(-len(p) // BLOCK_TOKENS) for p in (a, b)]
    shared = min(most, num_common(a, b) // BLOCK_TOKENS)
    assert num_common(*ids) == shared
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1]) - shared
