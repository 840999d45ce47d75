"""Pieces of one output, as the gateway hands them to vLLM's processors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from l4queue.client import AsyncHandle
from l4queue.protocol.records import CachedPrompt, TokenLogprobs

__all__ = ("Piece", "pieces_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New tokens, with logprobs each where they were asked for; `cached` may come with the first ones."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None = None
    cached: CachedPrompt | None = None


async def pieces_of(handle: AsyncHandle, *, cuts: Sequence[int]) -> AsyncGenerator[Piece, None]:
    """Tokens as they come, but cut at these offsets, between which they come whole."""
    ends = sorted({cut for cut in cuts if cut > 0})
    begun = 0
    ids: list[int] = []
    rows: list[TokenLogprobs] = []
    cached: CachedPrompt | None = None
    async for chunk in handle.stream():
        ids += chunk.token_ids
        rows += chunk.logprobs or ()
        cached = cached or chunk.cached
        while ids and (not ends or len(ids) >= ends[0] - begun):
            size = ends[0] - begun if ends else len(ids)
            yield Piece(token_ids=ids[:size], logprobs=rows[:size] or None, cached=None if begun else cached)
            ids, rows, begun = ids[size:], rows[size:], begun + size
            ends = ends[1:] if ends else ends
