"""An engine without a model: deterministic tokens at the times that the cost model predicts.

It batches as vLLM V1 does (`workers.engine.emulated.scheduler`). So dozens of workers run on a laptop, and their
measurements can be held against the simulator.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from l4queue.cost.step import BatchShape, StepCost
from workers.engine.base import (
    MAX_STEP_RECORDS,
    Cut,
    EngineDied,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    StepRecord,
)
from workers.engine.emulated.scheduler import EmulatedBatch
from workers.engine.emulated.tickets import covered_tokens, make_ticket

__all__ = ("EmulatedEngine",)

_DEFAULT_KV_TOKENS = 1_000_000  # where the cost model names no capacity: room for any test
_MAX_LATE_S = 0.05  # a loop that was held up for longer does not run to catch up


class EmulatedEngine:
    """Takes `speed` times the predicted time per step; 0 takes none, so that only the queue is measured.

    Generates exactly `max_tokens` unless one of the request's `stop_token_ids` comes up. A next token depends
    on all the ids before it: resumed from prompt and generated ids, a request goes on as if never cut.

    With a bandwidth, KV moves as `l4queue.cost.move.MovePrice` has it: a request with a ticket waits for its
    bytes, off the batch, and then prefills only what the ticket does not cover. Nothing is copied.
    """

    def __init__(
        self,
        cost: StepCost,
        *,
        speed: float = 1.0,
        max_model_len: int = 131_072,
        name: str = "",
        kv_bytes_per_s: float = 0.0,
        kv_bytes_per_token: int = 131_072,
        has_prefix_cache: bool = False,
    ) -> None:
        self._cost = replace(cost, kv_capacity_tokens=cost.kv_capacity_tokens or _DEFAULT_KV_TOKENS)
        self._speed = speed
        self._max_model_len = max_model_len
        self._name = name
        self._kv_bytes_per_s = kv_bytes_per_s
        self._kv_bytes_per_token = kv_bytes_per_token
        self._arriving: dict[str, asyncio.TimerHandle] = {}
        self._num_kv_loads = 0
        self._num_kv_misses = 0
        self._kv_loaded_bytes = 0
        self._has_prefix_cache = has_prefix_cache
        self._batch = EmulatedBatch(self._cost, has_prefix_cache=has_prefix_cache)
        self._out: list[EngineOutput] = []
        self._ready = asyncio.Event()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._num_steps = 0
        self._last_step_ms = 0.0
        self._records: deque[StepRecord] = deque(maxlen=MAX_STEP_RECORDS)

    async def start(self) -> EngineInfo:
        """Begin stepping."""
        self._task = asyncio.create_task(self._step_for_ever())
        self._task.add_done_callback(lambda _: self._ready.set())
        return EngineInfo(
            name="emulated",
            model=self._name or "none",
            version="1",
            max_model_len=self._max_model_len,
            kv_capacity_tokens=self._cost.kv_capacity_tokens,
            max_running=self._cost.max_num_seqs,
            max_batched_tokens=self._cost.max_batched_tokens,
            kv_bytes_per_token=self._kv_bytes_per_token if self._kv_bytes_per_s else 0,
            has_prefix_cache=self._has_prefix_cache,
        )

    async def add(self, request: EngineRequest) -> None:
        """Admit a request; one that can never be computed is refused through `outputs`."""
        if request.request_id in self._arriving:
            raise ValueError(f"request {request.request_id} is in the engine already")
        refusal = self._refusal(request)
        if refusal is None:
            self._receive(request)
        else:
            self._put([refusal])

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests at once, with what they have not handed out."""
        gone = set(request_ids)
        self._batch.abort(gone)
        for request_id in gone & self._arriving.keys():
            self._arriving.pop(request_id).cancel()
        self._out = [output for output in self._out if output.request_id not in gone]

    async def cut(self, request_id: str) -> Cut | None:
        """Forget it; the ticket says how far it was."""
        progress = self._batch.progress(request_id)
        if progress is None and request_id not in self._arriving:
            return None
        await self.abort([request_id])
        if progress is None or not self._kv_bytes_per_s:
            return Cut()
        request, num_tokens = progress
        return Cut(kv=make_ticket(request.token_ids, num_tokens=num_tokens))

    async def outputs(self) -> list[EngineOutput]:
        """All that came out since the last call, at least one."""
        while not self._out:
            if self._task is not None and self._task.done():
                raise EngineDied("the emulated engine has stopped") from _failure(self._task)
            self._ready.clear()
            await self._ready.wait()
        out, self._out = self._out, []
        return out

    def stats(self) -> EngineStats:
        """Load now."""
        return EngineStats(
            num_running=self._batch.num_running,
            num_waiting=self._batch.num_waiting + len(self._arriving),
            kv_used_tokens=self._batch.kv_used_tokens,
            num_steps=self._num_steps,
            last_step_ms=self._last_step_ms,
            num_preemptions=self._batch.num_preempted,
            num_kv_loads=self._num_kv_loads,
            num_kv_misses=self._num_kv_misses,
            kv_loaded_bytes=self._kv_loaded_bytes,
        )

    def kv_room_bytes(self) -> None:
        """Its tickets take no memory."""

    def step_records(self) -> list[StepRecord]:
        """Steps since the last call, with their predicted time."""
        records = list(self._records)
        self._records.clear()
        return records

    async def stop(self) -> None:
        """End stepping."""
        for arrival in self._arriving.values():
            arrival.cancel()
        self._arriving.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _receive(self, request: EngineRequest) -> None:
        """Let it wait for a seat, after the time that its KV takes to come."""
        has_ticket = bool(request.kv and self._kv_bytes_per_s)
        num_tokens = covered_tokens(request.kv, request.token_ids) if has_ticket else 0
        if not num_tokens:
            self._num_kv_misses += bool(request.kv)
            self._batch.add(request)
            self._work.set()
            return
        if self._batch.progress(request.request_id) is not None:
            raise ValueError(f"request {request.request_id} is in the engine already")
        num_bytes = num_tokens * self._kv_bytes_per_token
        delay_s = num_bytes / self._kv_bytes_per_s * self._speed
        loop = asyncio.get_running_loop()
        self._arriving[request.request_id] = loop.call_later(delay_s, self._arrive, request, num_tokens)
        self._num_kv_loads += 1
        self._kv_loaded_bytes += num_bytes

    def _arrive(self, request: EngineRequest, num_tokens: int) -> None:
        del self._arriving[request.request_id]
        self._batch.add(request, loaded_tokens=num_tokens)
        self._work.set()

    async def _step_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            if not self._batch:
                self._work.clear()
                await self._work.wait()
                due_s = loop.time()
            shape = self._batch.schedule()
            step_ms = self._cost.step_ms(shape)
            due_s = max(due_s, loop.time() - _MAX_LATE_S) + step_ms * self._speed / 1000
            await asyncio.sleep(max(0.0, due_s - loop.time()) if self._speed else 0)
            self._put(self._batch.finish())
            self._note(shape, step_ms)

    def _note(self, shape: BatchShape, step_ms: float) -> None:
        self._num_steps += 1
        self._last_step_ms = step_ms
        record = StepRecord(
            elapsed_ms=step_ms,
            num_decodes=shape.num_decodes,
            context_tokens=shape.context_tokens,
            prefill_tokens=shape.prefill_tokens,
            prefill_pairs=shape.prefill_pairs,
            skew_tokens=shape.skew_tokens,
        )
        self._records.append(record)

    def _refusal(self, request: EngineRequest) -> EngineOutput | None:
        """The only output of a request that can never be computed, for the field at fault."""
        field, why = self._fault(request)
        if not why:
            return None
        reason = FinishReason.ERROR
        return EngineOutput(
            request_id=request.request_id, token_ids=(), finish_reason=reason, error=why, field=field
        )

    def _fault(self, request: EngineRequest) -> tuple[str, str]:
        """The field that cannot be served, and why; both empty where all can."""
        length = len(request.token_ids) + request.max_tokens
        if not request.token_ids:
            return "prompt", "the prompt is empty"
        for field in ("structured_outputs", "logprobs"):
            if getattr(request.params, field) is not None:
                return field, f"{field} need a model: the emulated engine has none"
        if length > self._max_model_len:
            return "max_tokens", f"prompt and output of {length} tokens exceed the model's {self._max_model_len}"
        if length > self._cost.kv_capacity_tokens:
            capacity_tokens = self._cost.kv_capacity_tokens
            return "max_tokens", f"prompt and output of {length} tokens exceed the KV cache's {capacity_tokens}"
        return "", ""

    def _put(self, outputs: list[EngineOutput]) -> None:
        if outputs:
            self._out += outputs
            self._ready.set()


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()
