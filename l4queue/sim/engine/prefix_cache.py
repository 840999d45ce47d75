"""Prefix cache of one engine: full KV blocks by content, the least recently freed evicted first.

Rules taken from vLLM 0.32 (its `KVCacheManager` and `BlockPool`):

- A block is known by its content and everything before it, and only when it is full.
- It is known from the moment its tokens are scheduled, so requests of one step share already.
- A block that nobody holds stays until its space is needed. Unknown free blocks are used first.
- A request frees its blocks from the last to the first: of one request the tail is evicted first.
- Content that is computed although it is known takes blocks of its own. They are never found, but evicted in turn.
- The last token of a context is always computed. So the last block is, where all of it is known.

Blocks of a context are numbers in a `Chain`; equal numbers mean equal content.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator

from l4queue.cost.step import BLOCK_TOKENS
from l4queue.sim.engine.request import Chain, SimRequest

__all__ = ("PrefixCache", "num_leading", "part_of")


class PrefixCache:
    """Known blocks: held by running requests, or free and still there. Counts physical blocks shared by requests.

    A number below zero is a copy of content that was known already.
    """

    __slots__ = ("_block_tokens", "_evictable", "_free", "_held", "_next_copy", "_shared", "_taken")

    def __init__(self, block_tokens: int = BLOCK_TOKENS) -> None:
        self._block_tokens = block_tokens
        self._held: set[int] = set()
        self._shared: dict[int, int] = {}  # block → requests that hold it beside the first
        self._free: set[int] = set()
        # spans in the order in which they were freed: evicted from the first, each from its end
        self._evictable: deque[range] = deque()
        self._taken: dict[int, int] = {}  # block → spans there from which it has been taken again
        self._next_copy = -1

    @property
    def num_free(self) -> int:
        """Blocks that are known and that nobody holds."""
        return len(self._free)

    def find(self, request: SimRequest) -> int:
        """Leading blocks of the request's context that are known, without the block of its last token."""
        return self.num_known(request.chain, (request.length - 1) // self._block_tokens)

    def num_known(self, chain: Chain, most: int) -> int:
        """How many of the first `most` blocks of a chain are known, up to the first that is not."""
        return num_leading(chain, most, self._held, self._free)

    def num_held(self, request: SimRequest, num_blocks: int) -> int:
        """How many of the first `num_blocks` blocks of the context others hold: they need no space."""
        is_held = self._held.__contains__
        return sum(sum(map(is_held, span)) for span in part_of(request.chain, 0, num_blocks))

    def take(self, request: SimRequest, num_blocks: int) -> None:
        """Let the request hold the first `num_blocks` blocks of its context, which `find` has found."""
        held, free, shared = self._held, self._free, self._shared
        spans = list(part_of(request.chain, 0, num_blocks))
        for span in spans:
            if not held.isdisjoint(span):
                for block in filter(held.__contains__, span):
                    shared[block] = shared.get(block, 0) + 1
            for block in free.intersection(span):
                self._taken[block] = self._taken.get(block, 0) + 1
            free.difference_update(span)
            held.update(span)
        request.held = spans
        request.num_held_blocks = num_blocks

    def add(self, request: SimRequest, computed_tokens: int) -> None:
        """Make blocks known that are full once this much of the request is computed; it holds them."""
        upto = computed_tokens // self._block_tokens
        held, free = self._held, self._free
        for span in part_of(request.chain, request.num_held_blocks, upto):
            if held.isdisjoint(span) and free.isdisjoint(span):
                held.update(span)
                request.held.append(span)
            else:
                self._add_some(request, span)
        request.num_held_blocks = max(request.num_held_blocks, upto)

    def _add_some(self, request: SimRequest, span: range) -> None:
        """Blocks of which some are known already: those are held as copies."""
        for block in span:
            known = block in self._held or block in self._free
            number = self._next_copy if known else block
            self._next_copy -= known
            self._held.add(number)
            request.held.append(range(number, number + 1))

    def release(self, request: SimRequest, computed_tokens: int) -> int:
        """Free the request's blocks, what it generated made known. Returns how many of them others still hold."""
        own = list(part_of(request.chain, request.num_held_blocks, computed_tokens // self._block_tokens))
        if not all(self._held.isdisjoint(span) and self._free.isdisjoint(span) for span in own):
            self.add(request, computed_tokens)
            own = []
        num_shared = 0
        for span in reversed(own):
            self._free.update(span)
            self._evictable.append(span)
        for span in reversed(request.held):
            if self._shared.keys().isdisjoint(span):
                self._held.difference_update(span)
                self._free.update(span)
                self._evictable.append(span)
            else:
                num_shared += self._release_some(span)
        request.held = []
        request.num_held_blocks = 0
        return num_shared

    def _release_some(self, span: range) -> int:
        """Free those blocks of a span that no other request holds; how many others hold."""
        held, free, shared = self._held, self._free, self._shared
        num_shared = 0
        for block in reversed(span):
            others = shared.get(block)
            if others is None:
                held.remove(block)
                free.add(block)
                self._evictable.append(range(block, block + 1))
                continue
            num_shared += 1
            if others == 1:
                del shared[block]
            else:
                shared[block] = others - 1
        return num_shared

    def trim(self, num_blocks: int) -> None:
        """Evict until no more than this many free blocks are known."""
        too_many = len(self._free) - max(0, num_blocks)
        while too_many > 0:
            span = self._evictable.popleft()
            end = span[-too_many:]
            if len(end) < len(span):
                self._evictable.appendleft(span[: len(span) - len(end)])
            if not self._taken or self._taken.keys().isdisjoint(end):
                self._free.difference_update(end)
                too_many -= len(end)
            else:
                too_many -= sum(map(self._evict, reversed(end)))

    def _evict(self, block: int) -> bool:
        """Forget a block, unless it has been taken since it was freed."""
        times = self._taken.get(block)
        if times is None:
            self._free.remove(block)
        elif times == 1:
            del self._taken[block]
        else:
            self._taken[block] = times - 1
        return times is None

    def num_saved(self) -> int:
        """Blocks that sharing saves now: holders beyond the first, summed. For checks."""
        return sum(self._shared.values())


def num_leading(chain: Chain, most: int, *known: Container[int]) -> int:
    """How many of the first `most` blocks of a chain are in one of the containers, up to the first that is not.

    A container with a block has those before it: the place is found by bisection within a span.
    """
    found = 0
    for span in chain:
        size = min(len(span), most - found)
        if size <= 0:
            break
        last = span.start + size - 1
        if any(last in some for some in known):
            found += size
            continue
        low, high = 0, size - 1
        while low < high:
            middle = (low + high + 1) // 2
            block = span.start + middle - 1
            if any(block in some for some in known):
                low = middle
            else:
                high = middle - 1
        return found + low
    return found


def part_of(chain: Chain, first: int, stop: int) -> Iterator[range]:
    """The blocks from `first` to before `stop` of a chain."""
    at = 0
    for span in chain:
        if at >= stop:
            return
        low, high = max(0, first - at), min(len(span), stop - at)
        if low < high:
            yield span[low:high]
        at += len(span)
