"""Blocks of a prompt by content, as dispatchers and workers name them to each other.

The rule is vLLM's (`hash_block_tokens` of its `kv_cache_utils`): the key of a full block is a hash of its tokens
and of the key before it, so equal keys mean equal tokens from the beginning on. vLLM's own values cannot be used:
each engine begins its chains with a random number. What else it takes in (adapters, `cache_salt`, images) is not
offered here. A block has `BLOCK_TOKENS` tokens, a multiple of an engine's own: less is not worth a choice.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

__all__ = ("BLOCK_TOKENS", "KEY_BYTES", "block_keys")

BLOCK_TOKENS = 128
"""Tokens of a block. Chosen: vLLM's blocks have 16 on CUDA and 128 on CPUs, and all between divide it. Of
128 tokens the prefill takes 2 ms on an H100 (8B), and an index of them costs an eighth of one of 16."""
KEY_BYTES = 8
"""Bytes of a key. Of a million blocks two are alike once in 4 · 10^7 times, and then a worker prefills more."""


def block_keys(token_ids: Sequence[int]) -> list[bytes]:
    """Keys of the full blocks, in order."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    data, size, key, keys = memoryview(packed.tobytes()), BLOCK_TOKENS * packed.itemsize, b"", []
    for start in range(0, len(data) - size + 1, size):
        digest = blake2b(key, digest_size=KEY_BYTES)
        digest.update(data[start : start + size])
        key = digest.digest()
        keys.append(key)
    return keys
