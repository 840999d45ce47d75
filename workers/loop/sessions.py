"""Sessions of a worker: the requests that run here, which of them move, and the wake-up of its intake."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from l4queue.policy.prefix_blocks import BLOCK_TOKENS, block_keys
from l4queue.protocol.calls import MoveKind
from l4queue.protocol.records import CachedPrompt
from workers.loop.held_blocks import HeldBlocks
from workers.loop.session import Session

__all__ = ("Sessions",)

_KEPT = 0.999
"""Part of what is known of hits that the next request leaves: about the latest thousand count."""


class Sessions:
    """Holds them by their id in the engine. Changed on the event loop only; reading is safe on any thread."""

    def __init__(self) -> None:
        self._by_id: dict[str, Session] = {}
        self._woken = asyncio.Event()
        self._num_finished = 0
        self._num_stolen = 0
        self._num_handed_over = 0
        self._blocks: HeldBlocks | None = None
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._recent_tokens = self._recent_found = 0.0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_id.values()))

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._by_id

    def get(self, engine_id: str) -> Session | None:
        """The session with this id in the engine, if it still runs here."""
        return self._by_id.get(engine_id)

    def ids(self) -> frozenset[str]:
        """The ids in the engine of all."""
        return frozenset(self._by_id)

    @property
    def num_finished(self) -> int:
        """Requests settled by this worker."""
        return self._num_finished

    @property
    def num_stolen(self) -> int:
        """Waiting requests taken from other stages."""
        return self._num_stolen

    @property
    def num_handed_over(self) -> int:
        """Hand-overs and escapes begun."""
        return self._num_handed_over

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of requests that began here, of those whose engine told of its prefix cache."""
        return self._num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Of these, the ones that were found there."""
        return self._num_cached_tokens

    @property
    def found_share(self) -> float:
        """Share of prompt tokens that were found there lately."""
        return self._recent_found / self._recent_tokens if self._recent_tokens else 0.0

    @property
    def prefills(self) -> list[int]:
        """Tokens to compute of the requests here without a token yet, except where they bring their KV cache."""
        return [session.prefill_tokens for session in self.unfilled]

    @property
    def unfilled(self) -> list[Session]:
        """The requests here that have no token yet and do not bring their KV cache."""
        return [s for s in self if s.awaits_first_token and not s.grant.kv]

    @property
    def pending_prefill_tokens(self) -> int:
        """All of these together."""
        return sum(self.prefills)

    @property
    def blocks(self) -> HeldBlocks | None:
        """What the engine's prefix cache is believed to hold; None where nobody asks."""
        return self._blocks

    def keep_blocks(self, capacity: int) -> None:
        """Keep account from now on of the blocks in the engine's prefix cache, at most `capacity`."""
        self._blocks = HeldBlocks(capacity)

    def forget_blocks(self) -> None:
        """Keep no more account of them."""
        self._blocks = None

    def _use_blocks(self, session: Session) -> int:
        """Note that the engine has this one's blocks; how many of them it had before."""
        if self._blocks is None:
            return 0
        keys = block_keys(session.token_ids)
        found = self._blocks.num_leading(keys)
        self._blocks.use(keys)
        return found

    def add(self, session: Session, *, watch_tokens: int | None) -> None:
        """Run this one from now on; its move is considered from `watch_tokens` on, never where that is None."""
        session.expect_found(self._use_blocks(session) * BLOCK_TOKENS)
        self._by_id[session.engine_id] = session
        session.watch_from(watch_tokens)

    def watch(self, session: Session, *, from_tokens: int) -> None:
        """Consider a move of this one again at that length."""
        session.watch_from(from_tokens)

    def watch_all(self, *, from_tokens: int | None) -> None:
        """Consider moves of all that are as long as that or grow to it; none where it is None."""
        for session in self:
            session.watch_from(from_tokens)

    def begin_move(self, session: Session, kind: MoveKind | None = None) -> None:
        """Let this one leave: it moves nowhere else meanwhile. `kind` is None where it is given back."""
        if kind in (MoveKind.HANDOVER, MoveKind.ESCAPE):
            self._num_handed_over += 1
        session.begin_move()

    def end_move(self, session: Session) -> None:
        """This one stays."""
        session.end_move()

    def settle(self, session: Session) -> None:
        """This one has its outcome: count it and wake the intake."""
        self._by_id.pop(session.engine_id, None)
        self._use_blocks(session)
        self._num_finished += 1
        self.wake()

    def drop(self, session: Session) -> bool:
        """Forget this one, which goes on elsewhere or nowhere; False where it was gone already."""
        return self._by_id.pop(session.engine_id, None) is not None

    def count_cached(self, session: Session, cached: CachedPrompt) -> None:
        """Count the prompt of a request that began here, and how much of it was in the prefix cache."""
        if not session.grant.offset:
            self._num_prompt_tokens += len(session.prompt_ids)
            self._num_cached_tokens += cached.found_tokens
            self._recent_tokens = _KEPT * self._recent_tokens + len(session.prompt_ids)
            self._recent_found = _KEPT * self._recent_found + cached.found_tokens

    def count_stolen(self, num_requests: int) -> None:
        """Count waiting requests that were taken from other stages."""
        self._num_stolen += num_requests

    def wake(self) -> None:
        """Begin the next round of the intake now: there is room, or something to take."""
        self._woken.set()

    def begin_round(self) -> None:
        """Forget earlier wake-ups: the round that begins sees their cause."""
        self._woken.clear()

    async def woken(self) -> None:
        """Wait for a wake-up since the round began."""
        await self._woken.wait()
