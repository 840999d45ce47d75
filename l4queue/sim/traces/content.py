"""Content of prompts: chains of KV blocks from the hash ids of a trace, as Mooncake writes them.

Each hash id stands for one block of the prompt, 512 tokens in Mooncake's traces, and everything before it.
Requests with equal leading ids have a common prefix. A chain numbers the engine's own, smaller blocks. The output
gets numbers of its own: these traces do not tell whether a later prompt repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence

from l4queue.cost.step import BLOCK_TOKENS
from l4queue.sim.engine.request import Chain

__all__ = ("HASH_BLOCK_TOKENS", "Chains", "joined", "num_hashes")

HASH_BLOCK_TOKENS = 512
"""Tokens that a hash id stands for, where nothing else is said: Mooncake's traces (Qin et al., FAST 2025)."""


class Chains:
    """Numbers for blocks: equal for equal leading hash ids, else new."""

    def __init__(self, hash_block_tokens: int = HASH_BLOCK_TOKENS, *, block_tokens: int = BLOCK_TOKENS) -> None:
        """`hash_block_tokens` is a multiple of `block_tokens`, the engine's block."""
        self._block_tokens = block_tokens
        self._hash_block_tokens = hash_block_tokens
        self._size = hash_block_tokens // self._block_tokens
        self._known: dict[tuple[int, int], int] = {}  # (begin of the block before it, hash id) → begin
        self._next = 0

    def chain(self, ids: Sequence[int], *, prompt_tokens: int, output_tokens: int) -> Chain:
        """The chain of a request. There must be `num_hashes` ids."""
        known, size = self._known, self._size
        spans: list[range] = []
        before = -1
        for at, hash_id in enumerate(ids):
            start = known.get((before, hash_id))
            if start is None:
                start = known[before, hash_id] = self._new(size)
            whole = (
                min(self._hash_block_tokens, prompt_tokens - at * self._hash_block_tokens) // self._block_tokens
            )
            spans.append(range(start, start + whole))
            before = start
        rest = (prompt_tokens + output_tokens) // self._block_tokens - prompt_tokens // self._block_tokens
        spans.append(self.new_span(rest))
        return joined(spans)

    def new_span(self, num_blocks: int) -> range:
        """Blocks that nothing else has."""
        start = self._new(num_blocks)
        return range(start, start + num_blocks)

    def _new(self, num_blocks: int) -> int:
        start = self._next
        self._next += num_blocks
        return start


def num_hashes(prompt_tokens: int, hash_block_tokens: int) -> int:
    """Hash ids of a prompt; the last may stand for fewer tokens."""
    return -(-prompt_tokens // hash_block_tokens)


def joined(spans: Sequence[range]) -> Chain:
    """The spans as a chain: none empty, neighbours in one where their numbers follow."""
    found: list[range] = []
    for span in spans:
        if not span:
            continue
        if found and found[-1].stop == span.start:
            found[-1] = range(found[-1].start, span.stop)
        else:
            found.append(span)
    return tuple(found)
