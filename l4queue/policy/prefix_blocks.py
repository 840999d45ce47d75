"""Blocks of a prompt by content, as dispatchers and workers name them to each other.

The rule is vLLM's (`hash_block_tokens` of its `kv_cache_utils`): the key of a full block is a hash of its tokens
and of the key before it, so equal keys mean equal tokens from the beginning on. vLLM's own values cannot be used:
each engine begins its chains with a random number. What else it takes in (adapters, `cache_salt`, images) is not
offered here. A block has `BLOCK_TOKENS` tokens, a multiple of an engine's own: less is not worth a choice.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Container, Iterator, Sequence
from hashlib import blake2b

__all__ = (
    "BLOCK_TOKENS",
    "KEY_BYTES",
    "MOST_TOLD",
    "block_keys",
    "hash_ids",
    "next_key",
    "num_leading",
    "unpack_keys",
)

BLOCK_TOKENS = 128
"""Tokens of a block. Chosen: vLLM's blocks have 16 on CUDA and 128 on CPUs, and all between divide it. Of
128 tokens the prefill takes 2 ms on an H100 (8B), and an index of them costs an eighth of one of 16."""
KEY_BYTES = 8
"""Bytes of a key. Of a million blocks two are alike once in 4 · 10^7 times, and then a worker prefills more."""
MOST_TOLD = 512
"""Blocks of a prompt that are told with its end, the first ones. Chosen: they have 65,536 tokens and take 4 kB,
of 20,000 ended requests 80 MB at most."""


def block_keys(token_ids: Sequence[int], *, most: int | None = None) -> list[bytes]:
    """Keys of the full blocks, in order; of the first `most` only."""
    key, keys = b"", []
    full = len(token_ids) // BLOCK_TOKENS
    for number in range(full if most is None else min(most, full)):
        key = next_key(key, token_ids[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS])
        keys.append(key)
    return keys


def unpack_keys(blocks: bytes) -> list[bytes]:
    """The keys of blocks that are packed one behind the other."""
    return [blocks[at : at + KEY_BYTES] for at in range(0, len(blocks), KEY_BYTES)]


def hash_ids(blocks: bytes, prompt_tokens: int, *, known: dict[bytes, int], numbers: Iterator[int]) -> list[int]:
    """A number for each `BLOCK_TOKENS` of a prompt, the last of fewer: equal numbers for equal keys in `blocks`.

    Blocks without a key, as those filled in part, are like no others. `known` is what has been numbered so far.
    """
    keys = unpack_keys(blocks)
    full = prompt_tokens // BLOCK_TOKENS
    ids = [known[key] if key in known else known.setdefault(key, next(numbers)) for key in keys[:full]]
    return ids + [next(numbers) for _ in range(-(-prompt_tokens // BLOCK_TOKENS) - len(ids))]


def next_key(before: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a block with these tokens behind the block `before`; b"" is before the first one."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return blake2b(before + packed.tobytes(), digest_size=KEY_BYTES).digest()


def num_leading(keys: Sequence[bytes], *known: Container[bytes]) -> int:
    """How many of these blocks are in one of the containers, up to the first that is not."""
    for number, key in enumerate(keys):
        if not any(key in some for some in known):
            return number
    return len(keys)
