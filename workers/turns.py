"""One long prompt at a time in an engine whose scheduler lets several starve those behind them. Knows no vLLM."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from workers.engine import EngineRequest

__all__ = ("PrefillTurns",)

_FEW_STEPS = 2


class PrefillTurns:
    """Who waits until the prefill of a long prompt is over, by priority and arrival.

    vLLM gives the tokens of a step to what runs in the order in which that began. One prompt leaves a share of
    each step to others, but a second one takes all of that, and whoever generates behind the two gets no token
    until one is through; while long prompts keep coming, for as long as they come. So one prompt is prefilled at a
    time, beside those that are through with what it leaves in two steps.
    """

    def __init__(self, *, max_batched_tokens: int, max_chunk_tokens: int) -> None:
        self._most_beside = _FEW_STEPS * (max_batched_tokens - max_chunk_tokens)
        self._current = ""
        self._waiting: list[tuple[int, int, EngineRequest]] = []
        self._number = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def arrived(self, request: EngineRequest) -> bool:
        """Whether it may begin now. If not, it is kept until `over` gives it back."""
        if request.kv or len(request.token_ids) <= self._most_beside:
            return True
        if not self._current:
            self._current = request.request_id
            return True
        self._number += 1
        heappush(self._waiting, (request.priority, self._number, request))
        return False

    def over(self, request_id: str) -> EngineRequest | None:
        """A request has its first token or is gone: the one whose turn it is now, if its end gave it to one."""
        if request_id != self._current:
            if any(request.request_id == request_id for *_, request in self._waiting):
                self._waiting = [entry for entry in self._waiting if entry[2].request_id != request_id]
                heapify(self._waiting)
            return None
        if not self._waiting:
            self._current = ""
            return None
        following = heappop(self._waiting)[2]
        self._current = following.request_id
        return following
