"""An engine without a model: deterministic tokens at the times that the cost model predicts.

It batches as vLLM V1 does: decodes first, then prefill in chunks under a token budget, admission by priority
and arrival while the KV cache has room, preemption of the latest by recompute. So dozens of workers run on a
laptop, and what is measured on them can be held against the simulator.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from l4queue.policy.cost import BatchShape, StepCost
from workers.engine import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    StepRecord,
)

__all__ = ("EmulatedEngine", "next_token")

_VOCABULARY = 8000
_FIRST_TOKEN = 100  # below lie special tokens in most vocabularies; the emulated engine never says "end"
_WINDOW = 8
_MAX_STEP_RECORDS = 4096
_DEFAULT_KV_TOKENS = 1_000_000
_MASK = 2**64 - 1


def next_token(token_ids: Sequence[int]) -> int:
    """The token that follows: a hash of the length and of the last 8 ids, hence a function of the prefix."""
    state = len(token_ids)
    for token_id in token_ids[-_WINDOW:]:
        state = (state * 6364136223846793005 + token_id + 1442695040888963407) & _MASK
    return _FIRST_TOKEN + (state >> 33) % (_VOCABULARY - _FIRST_TOKEN)


class _Running:
    """One request inside the engine."""

    __slots__ = ("computed", "ids", "left", "number", "request")

    def __init__(self, request: EngineRequest, number: int) -> None:
        self.request = request
        self.number = number
        self.ids = list(request.token_ids)
        self.left = request.max_tokens
        self.computed = 0  # tokens whose keys and values are in the cache

    @property
    def is_prefilling(self) -> bool:
        return self.computed < len(self.ids) - 1 or self.computed == 0

    def __lt__(self, other: _Running) -> bool:
        return (self.request.priority, self.number) < (other.request.priority, other.number)


class EmulatedEngine:
    """Takes `speed` times the predicted time per step; 0 takes none."""

    def __init__(
        self, cost: StepCost, *, speed: float = 1.0, max_model_len: int = 131_072, name: str = ""
    ) -> None:
        self._cost = cost
        self._speed = speed
        self._max_model_len = max_model_len
        self._name = name
        self._capacity = cost.kv_capacity_tokens or _DEFAULT_KV_TOKENS
        self._waiting: list[_Running] = []
        self._running: list[_Running] = []
        self._known: dict[str, _Running] = {}
        self._out: list[EngineOutput] = []
        self._ready = asyncio.Event()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._number = 0
        self._num_steps = 0
        self._last_step_ms = 0.0
        self._records: deque[StepRecord] = deque(maxlen=_MAX_STEP_RECORDS)

    async def start(self) -> EngineInfo:
        """Begin stepping."""
        self._task = asyncio.create_task(self._step_for_ever())
        return EngineInfo(
            name="emulated",
            model=self._name or "none",
            version="1",
            max_model_len=self._max_model_len,
            kv_capacity_tokens=self._capacity,
            max_running=self._cost.max_num_seqs,
            max_batched_tokens=self._cost.max_batched_tokens,
        )

    async def add(self, request: EngineRequest) -> None:
        """Admit a request; one that can never fit is refused through `outputs`."""
        if len(request.token_ids) + request.max_tokens > min(self._max_model_len, self._capacity):
            self._put(request.request_id, (), FinishReason.ERROR, error="longer than this engine's KV cache")
            return
        self._number += 1
        entry = _Running(request, self._number)
        self._known[request.request_id] = entry
        heappush(self._waiting, entry)
        self._work.set()

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests at once."""
        gone = {entry for i in request_ids if (entry := self._known.pop(i, None)) is not None}
        if gone:
            self._running = [entry for entry in self._running if entry not in gone]
            self._waiting = [entry for entry in self._waiting if entry not in gone]
            heapify(self._waiting)

    async def outputs(self) -> list[EngineOutput]:
        """All that came out since the last call, at least one."""
        await self._ready.wait()
        self._ready.clear()
        out, self._out = self._out, []
        return out

    def stats(self) -> EngineStats:
        """Load now."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_used_tokens=sum(entry.computed for entry in self._running),
            num_steps=self._num_steps,
            last_step_ms=self._last_step_ms,
        )

    def step_records(self) -> list[StepRecord]:
        """Steps since the last call."""
        records = list(self._records)
        self._records.clear()
        return records

    async def stop(self) -> None:
        """End stepping."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _step_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            if not self._known:
                self._work.clear()
                await self._work.wait()
                due_s = loop.time()
            chunks = self._schedule()
            shape = self._shape(chunks)
            step_ms = self._cost.step_ms(shape)
            due_s = max(due_s, loop.time() - 0.05) + step_ms * self._speed / 1000  # no catching up for long
            await asyncio.sleep(max(0.0, due_s - loop.time()) if self._speed else 0)
            self._finish_step(chunks)
            self._num_steps += 1
            self._last_step_ms = step_ms
            self._records.append(
                StepRecord(
                    elapsed_ms=step_ms,
                    num_decodes=shape.num_decodes,
                    context_tokens=shape.context_tokens,
                    prefill_tokens=shape.prefill_tokens,
                    prefill_pairs=shape.prefill_pairs,
                    skew_tokens=shape.skew_tokens,
                )
            )

    def _schedule(self) -> list[tuple[_Running, int]]:
        """What the next step computes: (request, tokens), decodes with one token each first."""
        budget = self._cost.max_batched_tokens
        decodes = [(entry, 1) for entry in self._running if not entry.is_prefilling][:budget]
        budget -= len(decodes)
        while self._free() < len(decodes) and len(self._running) > 1:
            victim = max(self._running)
            self._preempt(victim)
            decodes = [pair for pair in decodes if pair[0] is not victim]
        prefills: list[tuple[_Running, int]] = []
        for entry in self._running:
            if entry.is_prefilling and budget > 0:
                chunk = min(budget, len(entry.ids) - entry.computed)
                prefills.append((entry, chunk))
                budget -= chunk
        promised = len(decodes) + sum(len(e.ids) - e.computed for e in self._running if e.is_prefilling)
        while self._waiting and budget > 0 and len(self._running) < self._cost.max_num_seqs:
            needed = len(self._waiting[0].ids)
            if self._running and promised + needed > self._free():
                break
            entry = heappop(self._waiting)
            self._running.append(entry)
            chunk = min(budget, needed)
            prefills.append((entry, chunk))
            budget -= chunk
            promised += needed
        return decodes + prefills

    def _finish_step(self, chunks: Sequence[tuple[_Running, int]]) -> None:
        """Account for the computed tokens; whoever has its whole prefix computed gets its next token."""
        for entry, chunk in chunks:
            request_id = entry.request.request_id
            if self._known.get(request_id) is not entry:  # aborted meanwhile
                continue
            entry.computed += chunk
            if entry.computed < len(entry.ids):
                continue
            token = next_token(entry.ids)
            entry.ids.append(token)
            entry.left -= 1
            reason = self._reason(entry, token)
            self._put(request_id, (token,), reason)
            if reason is not None:
                self._known.pop(request_id)
                self._running.remove(entry)

    def _reason(self, entry: _Running, token: int) -> FinishReason | None:
        generated = len(entry.ids) - len(entry.request.token_ids)
        if token in entry.request.params.stop_token_ids and generated >= entry.request.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if entry.left <= 0 else None

    def _preempt(self, victim: _Running) -> None:
        self._running.remove(victim)
        victim.computed = 0
        heappush(self._waiting, victim)

    def _free(self) -> int:
        return self._capacity - sum(entry.computed for entry in self._running)

    @staticmethod
    def _shape(chunks: Sequence[tuple[_Running, int]]) -> BatchShape:
        contexts = [e.computed for e, _ in chunks if not e.is_prefilling]
        prefills = [(e.computed, chunk) for e, chunk in chunks if e.is_prefilling]
        total = sum(contexts)
        return BatchShape(
            num_decodes=len(contexts),
            context_tokens=total,
            prefill_tokens=sum(chunk for _, chunk in prefills),
            prefill_pairs=sum(chunk * (before + chunk / 2) for before, chunk in prefills),
            skew_tokens=len(contexts) * max(contexts) - total if contexts else 0.0,
        )

    def _put(
        self, request_id: str, ids: tuple[int, ...], reason: FinishReason | None, *, error: str | None = None
    ) -> None:
        self._out.append(EngineOutput(request_id=request_id, token_ids=ids, finish_reason=reason, error=error))
        self._ready.set()
