"""Continuous batching as in vLLM V1, step by step and without time: the emulated engine's scheduler.

The rules are those of `l4queue.sim.engine.instance`, which advances the same batch in closed form; a test compares
the two. In each step decodes go first, one token each, then begun prefills, then waiting requests in order of
priority and arrival. Prefills go in chunks while the token budget lasts. With others there, no prompt gets all
of it. A prompt is admitted only if the KV cache has blocks for all of it, and never in a step that had to
preempt. When a decode finds no block, the request that comes last in that order loses its cache and waits to be
computed again. With a prefix cache, blocks that are known are neither computed again nor kept twice.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from struct import Struct
from zlib import crc32

from l4queue.cost.step import BLOCK_TOKENS, BatchShape, StepCost
from l4queue.models import UNBOUNDED_TOKENS
from l4queue.policy.prefix_blocks import next_key
from l4queue.protocol.records import CachedPrompt
from workers.engine.base import EngineOutput, EngineRequest, FinishReason
from workers.engine.emulated.block_cache import BlockCache

__all__ = ("BLOCK_TOKENS", "EmulatedBatch", "next_token", "next_tokens")

_SHORT_BYTES = 4  # of an id of a prompt as it travels
_VOCABULARY = 8000  # token ids; those of the tiny model end at 8,192
_FIRST_TOKEN = 100  # below lie special tokens in most vocabularies; a batch never says "end" by itself
_pack = Struct("<q").pack


def next_token(token_ids: Sequence[int]) -> int:
    """The token that follows: a hash of all of the ids, so that one lost or changed id shows for ever."""
    return _token(_hash(token_ids))


def next_tokens(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens that follow, one after the other."""
    state, found = _hash(token_ids), list[int]()
    for _ in range(num_tokens):
        found.append(_token(state))
        state = crc32(_pack(found[-1]), state)
    return found


class EmulatedBatch:
    """The requests of one engine and what its next step computes.

    `schedule` decides a step and says what it works on, `finish` applies it and returns what came out.
    Requests may be added and aborted in between. Each step costs time linear in the running requests.
    """

    def __init__(self, cost: StepCost, *, has_prefix_cache: bool = False) -> None:
        self._cache = BlockCache() if has_prefix_cache else None
        self._max_batched_tokens = cost.max_batched_tokens
        self._max_chunk_tokens = cost.max_chunk_tokens
        self._max_num_seqs = cost.max_num_seqs
        self._blocks_total = _blocks_below(cost.kv_capacity_tokens or UNBOUNDED_TOKENS)
        self._blocks_used = 0
        self._known: dict[str, _Entry] = {}
        self._running: dict[_Entry, None] = {}  # in order of admission
        self._waiting: list[_Entry] = []
        self._chunks: list[tuple[_Entry, int]] = []
        self._number = 0
        self.num_preempted = 0

    def __len__(self) -> int:
        return len(self._known)

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet, or preempted."""
        return len(self._waiting)

    @property
    def kv_used_tokens(self) -> int:
        """KV tokens taken, in whole blocks, promised to prefills included."""
        return self._blocks_used * BLOCK_TOKENS

    def add(self, request: EngineRequest, *, loaded_tokens: int = 0) -> None:
        """Let a request wait for admission; `loaded_tokens` of it have their KV already and are not prefilled.

        ValueError for an id that is there already.
        """
        if request.request_id in self._known:
            raise ValueError(f"request {request.request_id} is in the engine already")
        self._number += 1
        entry = self._known[request.request_id] = _Entry(request, self._number)
        entry.loaded = loaded_tokens
        heappush(self._waiting, entry)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests; unknown ids are ignored."""
        gone = {entry for i in request_ids if (entry := self._known.pop(i, None)) is not None}
        for entry in gone & self._running.keys():
            self._leave(entry)
        if any(entry in gone for entry in self._waiting):
            self._waiting = [entry for entry in self._waiting if entry not in gone]
            heapify(self._waiting)

    def progress(self, request_id: str) -> tuple[EngineRequest, int] | None:
        """A request and how many of its tokens have their KV in the cache: all but the last one generated."""
        entry = self._known.get(request_id)
        if entry is None:
            return None
        return entry.request, entry.length - (entry.to_prefill or 1) if entry in self._running else 0

    def schedule(self) -> BatchShape:
        """Decide the next step; its shape is empty when there is nothing to compute."""
        has_preempted = self._make_room()
        self._evict()
        running = self._running
        decodes = [entry for entry in running if not entry.to_prefill]
        budget = self._max_batched_tokens - len(decodes)
        longest = self._max_chunk_tokens if len(running) + len(self._waiting) > 1 else budget
        chunks: list[tuple[_Entry, int]] = []
        if len(decodes) < len(running):
            for entry in running:
                if entry.to_prefill and budget > 0:
                    budget -= self._give(entry, min(budget, longest), chunks)
        while self._waiting and budget > 0 and not has_preempted and len(running) < self._max_num_seqs:
            entry = self._waiting[0]
            found = self._find(entry)
            num_shared = self._cache.num_held(found) if self._cache is not None else 0
            blocks = _blocks(entry.length) - num_shared
            if running and self._blocks_used + blocks > self._blocks_total:
                break
            heappop(self._waiting)
            running[entry] = None
            entry.to_prefill = entry.length - max(entry.loaded, len(found) * BLOCK_TOKENS)
            entry.blocks = blocks + num_shared
            self._blocks_used += blocks
            self._hold(entry, found)
            budget -= self._give(entry, min(budget, longest), chunks)
        shape = _shape(decodes, chunks)
        self._chunks = [(entry, 0) for entry in decodes] + chunks
        return shape

    def finish(self) -> list[EngineOutput]:
        """Apply the step: a request whose whole prefix is computed gets its next token."""
        outputs = []
        for entry, chunk in self._chunks:
            if entry not in self._running:  # aborted meanwhile
                continue
            entry.to_prefill -= chunk
            if entry.to_prefill:
                continue
            token = entry.grow()
            reason = entry.reason(token)
            outputs.append(
                EngineOutput(
                    request_id=entry.request.request_id,
                    token_ids=(token,),
                    finish_reason=reason,
                    cached=self._told(entry),
                )
            )
            if reason is not None:
                del self._known[entry.request.request_id]
                self._leave(entry)
            elif entry.length > entry.blocks * BLOCK_TOKENS:
                entry.blocks += 1
                self._blocks_used += 1
        self._chunks = []
        return outputs

    def _make_room(self) -> bool:
        """Preempt from the back until every decode has its block; True when something was preempted."""
        has_preempted = False
        while self._blocks_used > self._blocks_total and len(self._running) > 1:
            victim = max(self._running)
            self._leave(victim)
            victim.loaded = 0
            heappush(self._waiting, victim)
            self.num_preempted += 1
            has_preempted = True
        return has_preempted

    def _leave(self, entry: _Entry) -> None:
        del self._running[entry]
        self._blocks_used -= entry.blocks
        if self._cache is not None:
            self._add(entry, entry.length - (entry.to_prefill or 1))
            self._blocks_used += self._cache.release(entry.held)
            entry.held = []

    def _give(self, entry: _Entry, most: int, chunks: list[tuple[_Entry, int]]) -> int:
        chunk = min(most, entry.to_prefill)
        chunks.append((entry, chunk))
        self._add(entry, entry.length - entry.to_prefill + chunk)
        return chunk

    def _find(self, entry: _Entry) -> Sequence[bytes]:
        """Keys of the leading blocks that are known, without the block of the last token."""
        if self._cache is None:
            return ()
        keys = entry.keys((entry.length - 1) // BLOCK_TOKENS)
        return keys[: self._cache.num_leading(keys)]

    def _hold(self, entry: _Entry, found: Sequence[bytes]) -> None:
        """Let an admitted request hold what was found; of its own only as many free blocks are kept as fit."""
        if self._cache is None:
            return
        if entry.found_tokens is None:
            entry.found_tokens = len(found) * BLOCK_TOKENS
        self._cache.take(found)
        entry.held = list(found)
        self._add(entry, entry.loaded)
        self._evict()

    def _add(self, entry: _Entry, computed_tokens: int) -> None:
        """Make the full blocks of the first `computed_tokens` known."""
        upto = computed_tokens // BLOCK_TOKENS
        if self._cache is not None and upto > len(entry.held):
            entry.held += map(self._cache.add, entry.keys(upto)[len(entry.held) :])

    def _evict(self) -> None:
        if self._cache is not None:
            self._cache.trim(self._blocks_total - self._blocks_used)

    def _told(self, entry: _Entry) -> CachedPrompt | None:
        """Once, with the first token: what of the prompt was known."""
        if self._cache is None or entry.num_generated != 1 or entry.found_tokens is None:
            return None
        made = len(entry.request.token_ids) // BLOCK_TOKENS * BLOCK_TOKENS - entry.found_tokens
        return CachedPrompt(found_tokens=entry.found_tokens, made_tokens=max(0, made))


class _Entry:
    """One request in a batch."""

    __slots__ = (
        "_generated",
        "_hash",
        "_key",
        "_keys",
        "blocks",
        "found_tokens",
        "held",
        "left",
        "length",
        "loaded",
        "num_generated",
        "request",
        "to_prefill",
    )

    def __init__(self, request: EngineRequest, number: int) -> None:
        self.request = request
        self.length = len(request.token_ids)  # prompt and generated, tokens
        self.left = request.max_tokens
        self.num_generated = 0
        self.to_prefill = 0
        self.loaded = 0
        self.blocks = 0
        self.found_tokens: int | None = None  # of the prompt, when it was first admitted
        self.held: list[bytes] = []  # blocks of the prefix cache
        self._keys: list[bytes] = []
        self._generated = array("q")
        self._hash = _hash(request.token_ids)
        self._key = (request.priority, number)

    def __lt__(self, other: _Entry) -> bool:
        return self._key < other._key

    def keys(self, num_blocks: int) -> list[bytes]:
        """Keys of the first blocks of prompt and output."""
        if num_blocks > len(self._keys):
            ids = array("q", self.request.token_ids) + self._generated
            for start in range(len(self._keys) * BLOCK_TOKENS, num_blocks * BLOCK_TOKENS, BLOCK_TOKENS):
                parent = self._keys[-1] if self._keys else b""
                self._keys.append(next_key(parent, ids[start : start + BLOCK_TOKENS]))
        return self._keys[:num_blocks]

    def grow(self) -> int:
        """The next token, taken in."""
        token = _token(self._hash)
        self._generated.append(token)
        self._hash = crc32(_pack(token), self._hash)
        self.length += 1
        self.left -= 1
        self.num_generated += 1
        return token

    def reason(self, token: int) -> FinishReason | None:
        """Why the request ends with this token, if it does."""
        if token in self.request.params.stop_token_ids and self.num_generated >= self.request.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.left <= 0 else None


def _hash(token_ids: Sequence[int]) -> int:
    """The state after all of these: a CRC of 64 bits for each, wherever they are held."""
    if not isinstance(token_ids, array) or token_ids.itemsize != _SHORT_BYTES or sys.byteorder != "little":
        return crc32(array("q", token_ids).tobytes())
    narrow, wide = token_ids.tobytes(), bytearray(2 * _SHORT_BYTES * len(token_ids))
    for byte in range(_SHORT_BYTES):  # a hundred times as fast as a number of Python for each
        wide[byte :: 2 * _SHORT_BYTES] = narrow[byte::_SHORT_BYTES]
    return crc32(wide)


def _token(state: int) -> int:
    # CRC is linear: the multiplication keeps neighbouring states from giving neighbouring tokens
    return _FIRST_TOKEN + ((state * 2654435761) >> 16 & 0xFFFFFFFF) % (_VOCABULARY - _FIRST_TOKEN)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _blocks_below(tokens: int) -> int:
    return max(1, tokens // BLOCK_TOKENS)


def _shape(decodes: Sequence[_Entry], chunks: Sequence[tuple[_Entry, int]]) -> BatchShape:
    lengths = [entry.length for entry in decodes]
    total = sum(lengths)
    return BatchShape(
        num_decodes=len(lengths),
        context_tokens=total,
        prefill_tokens=sum(chunk for _, chunk in chunks),
        prefill_pairs=sum(chunk * (e.length - e.to_prefill + chunk / 2) for e, chunk in chunks),
        skew_tokens=len(lengths) * max(lengths) - total if lengths else 0.0,
    )
