"""Runner of batches in one gateway: takes batches without a lease, renews its leases, runs each in a thread."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gateway.batches.execution import BatchControl, BatchExecution
from gateway.batches.metrics import BatchMetrics
from gateway.batches.parts import LeaseLost
from gateway.batches.store import FileStore, file_name
from gateway.keys import ApiKeys
from l4queue.client.batch.halves import Halves
from l4queue.config import Settings
from l4queue.errors import L4QueueError
from l4queue.protocol.batch_records import BatchCalls, BatchRecord, BatchState
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.file_records import FileCalls
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads

__all__ = ("BatchRunner",)

log = logging.getLogger("l4queue.gateway.batches")
_EVERY_S = 1.0  # between two rounds: counts of a running batch are at most this old
_LEASES = 3  # a worker's leases: an upload or a long prompt may hold up the event loop for seconds
_MAX_RUNNING = 4  # batches of one gateway; chosen: each fills the fleet, more would only share it
_MAX_HELD = 32  # with those that wait for a limit of their key; each is a thread that sleeps, and a connection
_LOOK_AT = 200  # of the oldest unfinished batches, and as many of the others in turn
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # before a batch is tried again whose run has failed
_SWEEP_EVERY_S = 60.0  # expired files may be that old
_SWEEP_FILES = 100  # of one sweep


@dataclass(slots=True, kw_only=True)
class _Running:
    record: BatchRecord
    control: BatchControl
    work: asyncio.Future[BatchState | None]

    @property
    def limited_by(self) -> str:
        """The limit of its key that it waits for."""
        return "" if self.control.progress is None else self.control.progress.limited_by


@dataclass(slots=True, kw_only=True)
class _Pause:
    """A batch whose run has failed waits, twice as long each time."""

    length_s: float
    until_s: float


class BatchRunner:
    """Belongs to one event loop."""

    def __init__(
        self,
        settings: Settings,
        store: FileStore,
        executor: AsyncExecutor,
        metrics: BatchMetrics,
        *,
        halves: Halves | None,
        api_keys: ApiKeys,
    ) -> None:
        self._settings, self._store, self._metrics, self._halves = settings, store, metrics, halves
        self._api_keys = api_keys
        keys = Keys(settings.namespace)
        self._batches, self._files, self._reads = BatchCalls(keys), FileCalls(keys), Reads(keys)
        self._executor = executor
        self._of_threads = Executor(settings.redis_url)
        self._threads = ThreadPoolExecutor(_MAX_HELD, thread_name_prefix="batch")
        self._running: dict[str, _Running] = {}
        self._pauses: dict[str, _Pause] = {}
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._rounds: asyncio.Task[None] | None = None
        self._trouble = ""
        self._swept_s = 0.0
        self._next_page = _LOOK_AT

    @property
    def _lease_ms(self) -> int:
        return int(_LEASES * self._settings.lease_s * 1000)

    def wake(self) -> None:
        """Look at once: there may be a new batch, or one to be cancelled."""
        self._wake.set()

    def start(self) -> None:
        """Begin the rounds, which go on until `close`."""
        self._rounds = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Leave all batches to other gateways, at once: what is done is durable, and their leases end."""
        self._is_stopping = True
        self._wake.set()
        if self._rounds is not None:
            await self._rounds
        for one in self._running.values():
            one.control.stop.set()
        await asyncio.gather(*(one.work for one in self._running.values()), return_exceptions=True)
        for batch_id, one in list(self._running.items()):
            await self._left(batch_id, one)
        self._threads.shutdown()
        self._of_threads.close()

    async def _run(self) -> None:
        while not self._is_stopping:
            try:
                await self._round()
                self._trouble = ""
            except L4QueueError as error:  # Redis or the store is away: said once, tried again
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.warning("batches wait: %s", error)
            except Exception:  # a fault of ours is not to end all batches
                log.exception("a round of batches failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_S):
                    await self._wake.wait()
            self._wake.clear()

    async def _round(self) -> None:
        store_id = await asyncio.to_thread(lambda: self._store.store_id)
        for batch_id, one in list(self._running.items()):
            if one.work.done():
                await self._left(batch_id, one)
            else:
                await self._keep(batch_id, one)
        self._metrics.limited(Counter(one.limited_by for one in self._running.values()))
        ids = await self._unfinished(store_id)
        reads: list[Call[Any]] = [self._batches.read(batch_id) for batch_id in ids]
        now_ms, *records = await self._executor.run_many([self._reads.server_time_ms(), *reads])
        old_s = time.monotonic() - _LONGEST_PAUSE_S
        self._pauses = {batch_id: pause for batch_id, pause in self._pauses.items() if pause.until_s > old_s}
        self._metrics.unfinished(Counter(r.shown_state for r in records[:_LOOK_AT] if r is not None))
        for batch_id, record in zip(ids, records, strict=True):
            if record is None:  # somebody has deleted it
                await self._executor.run(self._batches.forget(store_id, batch_id))
            elif record.held_until_ms <= now_ms and self._may_take(record, now_ms=now_ms):
                await self._take(record)
        if time.monotonic() - self._swept_s > min(_SWEEP_EVERY_S, self._settings.http_files_ttl_s):
            await self._sweep(store_id, {r.input_file_id for r in records if r is not None})
            self._swept_s = time.monotonic()

    async def _unfinished(self, store_id: str) -> list[str]:
        """The oldest unfinished batches, and a page of the others: limits may hold up those of a key."""
        ids = await self._executor.run(self._batches.unfinished(store_id, limit=_LOOK_AT))
        if len(ids) < _LOOK_AT:
            return ids
        page = self._batches.unfinished(store_id, limit=_LOOK_AT, skip=self._next_page)
        others = await self._executor.run(page)
        self._next_page = self._next_page + _LOOK_AT if len(others) == _LOOK_AT else _LOOK_AT
        return list(dict.fromkeys((*ids, *others)))

    def _may_take(self, record: BatchRecord, *, now_ms: int) -> bool:
        """Whether a batch that nobody runs can be taken now.

        Batches that wait for a limit take no place from others. Of a key with limits one runs at a time, since
        more would share the limits. One that is to end needs none.
        """
        pause = self._pauses.get(record.batch_id)
        is_waiting = pause is not None and time.monotonic() < pause.until_s
        num_busy = sum(not one.limited_by for one in self._running.values())
        has_room = num_busy < _MAX_RUNNING and len(self._running) < _MAX_HELD and not self._is_stopping
        if not has_room or is_waiting or record.batch_id in self._running:
            return False
        is_to_end = record.cancelling_ms is not None or record.expires_ms <= now_ms
        has_another = any(one.record.owner == record.owner for one in self._running.values())
        return is_to_end or not has_another or not self._api_keys.allowance(record.owner)

    async def _take(self, record: BatchRecord) -> None:
        """Run a batch, if nobody else does."""
        token = uuid.uuid4().hex
        hold = self._batches.hold(record.batch_id, token=token, lease_ms=self._lease_ms)
        verdict, cancelling_ms = await self._executor.run(hold)
        if verdict is not Verdict.OK:
            return
        current = await self._executor.run(self._batches.read(record.batch_id))  # the last holder may have gone on
        if current is None:
            return
        control = BatchControl(token=token, is_cancelling=cancelling_ms is not None)
        log.info("runs a batch", extra={"batch": record.batch_id, "state": current.shown_state.value})

        def execute() -> BatchState | None:
            parts = (self._settings, self._store, self._of_threads, current, control)
            return BatchExecution(*parts, halves=self._halves, api_keys=self._api_keys).run()

        work = asyncio.get_running_loop().run_in_executor(self._threads, execute)
        work.add_done_callback(lambda _: self._wake.set())
        self._running[record.batch_id] = _Running(record=current, control=control, work=work)

    async def _keep(self, batch_id: str, one: _Running) -> None:
        """Extend the lease, tell counts, hear of a cancel."""
        hold = self._batches.hold(batch_id, token=one.control.token, lease_ms=self._lease_ms, is_renewal=True)
        verdict, cancelling_ms = await self._executor.run(hold)
        if verdict is not Verdict.OK:
            if verdict is Verdict.LOST:
                log.warning("lost a batch to another gateway", extra={"batch": batch_id})
            one.control.stop.set()
            return
        if cancelling_ms is not None:
            one.control.is_cancelling = True
        progress = one.control.progress
        if progress is not None and not one.work.done():
            counts = {
                "num_succeeded": progress.num_finished - progress.num_failed,
                "num_failed": progress.num_failed,
            }
            await self._executor.run(
                self._batches.note(batch_id, store=one.record.store, token=one.control.token, changes=counts)
            )

    async def _left(self, batch_id: str, one: _Running) -> None:
        """Note how a run has ended; one that has not ended its batch frees it for others."""
        del self._running[batch_id]
        error = one.work.exception()
        if error is None:
            self._pauses.pop(batch_id, None)
            state = one.work.result()
            if state is not None:
                self._metrics.ended(state)
                log.info("a batch has ended", extra={"batch": batch_id, "state": state.value})
                return
        elif not isinstance(error, LeaseLost):
            pause = self._pauses.get(batch_id)
            length_s = min(_LONGEST_PAUSE_S, 2 * pause.length_s) if pause else _FIRST_PAUSE_S
            self._pauses[batch_id] = _Pause(length_s=length_s, until_s=time.monotonic() + length_s)
            log.error("a batch waits", extra={"batch": batch_id, "for_s": length_s}, exc_info=error)
        free = self._batches.note(
            batch_id, store=one.record.store, token=one.control.token, changes={"held_until_ms": 0}
        )
        await self._executor.offer(free)

    async def _sweep(self, store_id: str, needed: set[str]) -> None:
        """Remove files that have expired, but for inputs of unfinished batches."""
        now_ms = await self._executor.run(self._reads.server_time_ms())
        due = await self._executor.run(self._files.due(store_id, now_ms=now_ms, limit=_SWEEP_FILES))
        for file_id in due:
            if file_id in needed:
                continue
            record = await self._executor.run(self._files.read(file_id))
            await asyncio.to_thread(self._store.delete, file_name(file_id))
            calls = (self._files.drop_due(store_id, file_id),) if record is None else self._files.drop(record)
            await self._executor.run_many(calls)
