"""Admission of one long prompt at a time: in vLLM two concurrent long prefills starve all requests behind them."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from workers.engine.base import EngineRequest

__all__ = ("PrefillGate",)

_FEW_STEPS = 2  # a prompt that short takes others' tokens only briefly


class PrefillGate:
    """Prompts that wait until the prefill of a long one is over, by priority and arrival.

    vLLM gives the tokens of a step to running requests in the order in which they began. A prompt of many steps
    leaves a share of each step to others. A second long prompt takes all of that share, and requests that
    generate behind the two get no token until one is through, for as long as long prompts come. So beside a
    prompt of more than one step only prompts are admitted that fit into the share it leaves in two steps.
    """

    def __init__(self, *, max_batched_tokens: int, max_chunk_tokens: int) -> None:
        self._max_chunk_tokens = max_chunk_tokens
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
        if self._current:
            self._number += 1
            heappush(self._waiting, (request.priority, self._number, request))
            return False
        self._begin(request)
        return True

    def over(self, request_id: str) -> list[EngineRequest]:
        """A request has its first token or is gone. Returns the requests that may begin now, in order."""
        if request_id != self._current:
            if any(request.request_id == request_id for *_, request in self._waiting):
                self._waiting = [entry for entry in self._waiting if entry[2].request_id != request_id]
                heapify(self._waiting)
            return []
        self._current = ""
        following = []
        while self._waiting and not self._current:
            request = heappop(self._waiting)[2]
            self._begin(request)
            following.append(request)
        return following

    def _begin(self, request: EngineRequest) -> None:
        if len(request.token_ids) > self._max_chunk_tokens:
            self._current = request.request_id
