"""Listeners: the one blocking read of a client for all requests that it waits for.

The asyncio one reads in a task, the blocking one in a thread; both run only while somebody waits.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from l4queue.client.core import Chunk, ClientCore
from l4queue.client.demux import Demultiplexer, RequestWatch
from l4queue.client.waiting import time_left_s, wait_async
from l4queue.errors import L4QueueError, ServiceUnavailable
from l4queue.models import RequestState
from l4queue.protocol.calls import Call
from l4queue.protocol.records import OutputEntry, RequestRecord

if TYPE_CHECKING:
    from l4queue.protocol.executor import AsyncExecutor, Executor

__all__ = ("AsyncListener", "Listener")

_Waiting = tuple[Sequence[Call[Any]], asyncio.Future[list[Any]]]
_COUNT = 1000  # entries of one stream in one reply
_TRIM_EVERY = 4096  # news
_BATCH = 128  # calls of one round trip
_CLOSED = "the client was closed"
_MANY_WAITS = 64  # chosen: fewer streams are read in good time, chunk by chunk
_PAUSE_S = 0.01
"""A reader for `_MANY_WAITS` or more pauses so long between two reads, s. Chosen: a reply has several news then.
With 1,000 streams a chunk costs Redis 26 us instead of 30, and comes 5 ms later (bench/many_streams.py). Pauses of
15 ms save no more."""


def _demultiplexer(core: ClientCore) -> Demultiplexer:
    keys, client_id = core.keys, core.client_id
    return Demultiplexer(mail_key=keys.mailbox(client_id), news_key=keys.news(client_id))


def _is_drained(found: dict[str, list[Any]]) -> bool:
    return all(len(entries) < _COUNT for entries in found.values())


class AsyncListener:
    """Reads for all waits of an asyncio client. Calls of many waits at once share round trips."""

    def __init__(self, executor: AsyncExecutor, core: ClientCore) -> None:
        self._executor = executor
        self._core = core
        self._demux = _demultiplexer(core)
        self._reader: asyncio.Task[None] | None = None
        self._calls: deque[_Waiting] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def begin(self, watches: Sequence[RequestWatch]) -> None:
        """Begin waits: on return each knows where its request is, but for those that mail will tell."""
        self._executor.check_loop()
        now_s = time.monotonic()
        for watch in watches:
            self._demux.add(watch, now_s=now_s)
        queries = list(self._demux.first_queries(watches))
        replies = await self._run([self._core.follow(query) for _, query in queries]) if queries else []
        for (asked, _), reply in zip(queries, replies, strict=True):
            self._demux.opened(asked, reply)
        if (self._reader is None or self._reader.done()) and any(watch.is_waiting for watch in watches):
            self._reader = asyncio.create_task(self._read())

    def end(self, watches: Sequence[RequestWatch]) -> None:
        """End waits."""
        for watch in watches:
            self._demux.remove(watch)

    async def wait_for_end(
        self, request_id: str, *, has_mail: bool, asks: bool, deadline: float | None
    ) -> RequestState | None:
        """The state in which a request has ended, once this client was told; for `asks` see `RequestWatch`."""
        event = asyncio.Event()
        watch = RequestWatch(request_id, wake=event.set, has_mail=has_mail, asks=asks)
        try:
            await self.begin([watch])
            while not watch.take()[2]:
                left_s = time_left_s(deadline, f"request {request_id} is not finished")
                await wait_async(event, left_s)
                event.clear()
        finally:
            self.end([watch])
        return watch.state

    async def read(self, watch: RequestWatch) -> None:
        """Read the output stream from where this wait is."""
        watch.read(*await self.output(watch.request_id, after=watch.offset))

    async def output(self, request_id: str, *, after: int = 0) -> tuple[RequestRecord | None, list[OutputEntry]]:
        """The record and the output beyond `after` tokens."""
        record, entries = await self._run(self._core.output(request_id, after=after))
        return record, entries

    async def outcome(self, request_id: str, *, is_first: bool) -> tuple[RequestRecord | None, list[OutputEntry]]:
        """The record and the whole output; read for the first time, the output may tell both."""
        if is_first:
            ((record, entries),) = await self._run([self._core.ended(request_id)])
            if record is not None:
                return record, entries
        return await self.output(request_id)

    async def close(self) -> None:
        """End the reader; what still waits fails. The next wait begins anew."""
        tasks = [task for task in (self._reader, self._sender) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_calls(self._calls)  # a sender that is cancelled before its first step fails none
        self._calls.clear()
        self._demux.fail(ServiceUnavailable(_CLOSED))

    async def _read(self) -> None:
        num_news = 0
        try:
            while not self._demux.is_idle:
                queries = self._demux.due(time.monotonic())
                replies = await self._executor.run_many([self._core.follow(query) for query in queries])
                for query, reply in zip(queries, replies, strict=True):
                    self._demux.answered(query, reply, now_s=time.monotonic())
                block_s = self._demux.block_s(time.monotonic())
                found = await self._executor.wait(self._demux.streams, block_s=block_s, count=_COUNT)
                num_news += self._demux.feed(found, now_s=time.monotonic(), is_drained=_is_drained(found))
                await self._executor.run_many([self._core.unfollow(i) for i in self._demux.unwanted()])
                if num_news >= _TRIM_EVERY:
                    num_news = 0
                    await self._executor.run(self._core.trim_news(self._demux.last_news))
                # waits that have ended leave meanwhile: nothing is read for them any more
                await asyncio.sleep(_PAUSE_S if self._demux.num_waits >= _MANY_WAITS else 0)
        except L4QueueError as error:
            self._demux.fail(error)
        except Exception as error:
            self._demux.fail(ServiceUnavailable(f"the client cannot read what it is told: {error!r}"))
            raise

    async def _run(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Execute calls in order, in one round trip with those of other waits."""
        self._executor.check_loop()
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._calls.append((calls, future))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
        return await future

    async def _send(self) -> None:
        while self._calls:
            batch: list[_Waiting] = []
            num_calls = 0
            while self._calls and num_calls < _BATCH:
                batch.append(self._calls.popleft())
                num_calls += len(batch[-1][0])
            try:
                await self._send_batch(batch)
            except asyncio.CancelledError:
                self._fail_calls(batch)
                raise

    def _fail_calls(self, calls: Iterable[_Waiting]) -> None:
        """Calls that a closed client will not send."""
        for _, future in calls:
            if not future.done():
                future.set_exception(ServiceUnavailable(_CLOSED))

    async def _send_batch(self, batch: Sequence[_Waiting]) -> None:
        try:
            values = await self._executor.run_many([call for calls, _ in batch for call in calls])
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, ServiceUnavailable):
                for one in batch:  # what cannot be read of one request is no fault of the others
                    await self._send_batch([one])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(copy(error))
            return
        begin = 0
        for calls, future in batch:
            end = begin + len(calls)
            if not future.done():
                future.set_result(values[begin:end])
            begin = end


class Listener:
    """Reads for all waits of a blocking client, in a thread of its own. Thread-safe."""

    def __init__(self, executor: Executor, core: ClientCore) -> None:
        self._executor = executor
        self._core = core
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._demux = _demultiplexer(self._core)
        self._lock = threading.RLock()
        self._reader: threading.Thread | None = None
        self._is_closed = False

    def begin(self, watches: Sequence[RequestWatch]) -> None:
        """Begin waits: on return each knows where its request is, but for those that mail will tell."""
        if (
            self._pid != os.getpid()
        ):  # a fork has neither the thread nor the waits, and maybe a lock that stays held
            self._begin_anew()
        with self._lock:
            self._is_closed = False
            now_s = time.monotonic()
            for watch in watches:
                self._demux.add(watch, now_s=now_s)
            queries = list(self._demux.first_queries(watches))
        replies = self._executor.run_many([self._core.follow(query) for _, query in queries])
        with self._lock:
            for (asked, _), reply in zip(queries, replies, strict=True):
                self._demux.opened(asked, reply)
            is_reading = self._reader is not None and self._reader.is_alive()
            if not is_reading and not self._is_closed and any(watch.is_waiting for watch in watches):
                self._reader = threading.Thread(target=self._read, name="l4queue-listener", daemon=True)
                self._reader.start()

    def end(self, watches: Sequence[RequestWatch]) -> None:
        """End waits. Takes no lock: an abandoned stream may end at any moment of any thread."""
        for watch in watches:
            self._demux.remove(watch)

    def wait_for_end(
        self, request_id: str, *, has_mail: bool, asks: bool, deadline: float | None
    ) -> RequestState | None:
        """The state in which a request has ended, once this client was told; for `asks` see `RequestWatch`."""
        event = threading.Event()
        watch = RequestWatch(request_id, wake=event.set, has_mail=has_mail, asks=asks)
        try:
            self.begin([watch])
            while not self.take(watch)[2]:
                left_s = time_left_s(deadline, f"request {request_id} is not finished")
                event.wait(left_s)
                event.clear()
        finally:
            self.end([watch])
        return watch.state

    def take(self, watch: RequestWatch) -> tuple[list[Chunk], bool, bool]:
        """What `RequestWatch.take` says."""
        with self._lock:
            return watch.take()

    def read(self, watch: RequestWatch) -> None:
        """Read the output stream from where this wait is."""
        record, entries = self.output(watch.request_id, after=watch.offset)
        with self._lock:
            watch.read(record, entries)

    def output(self, request_id: str, *, after: int = 0) -> tuple[RequestRecord | None, list[OutputEntry]]:
        """The record and the output beyond `after` tokens."""
        record, entries = self._executor.run_many(self._core.output(request_id, after=after))
        return record, entries

    def outcome(self, request_id: str, *, is_first: bool) -> tuple[RequestRecord | None, list[OutputEntry]]:
        """The record and the whole output; read for the first time, the output may tell both."""
        if is_first:
            record, entries = self._executor.run(self._core.ended(request_id))
            if record is not None:
                return record, entries
        return self.output(request_id)

    def close(self) -> None:
        """Fail all waits and end the reader. The next wait begins anew."""
        with self._lock:
            self._is_closed = True
            self._demux.fail(ServiceUnavailable(_CLOSED))

    def _read(self) -> None:
        num_news = 0
        try:
            while True:
                with self._lock:
                    if self._demux.is_idle or self._is_closed:
                        self._reader = None
                        return
                    queries = self._demux.due(time.monotonic())
                replies = self._executor.run_many([self._core.follow(query) for query in queries])
                with self._lock:
                    for query, reply in zip(queries, replies, strict=True):
                        self._demux.answered(query, reply, now_s=time.monotonic())
                    streams, block_s = self._demux.streams, self._demux.block_s(time.monotonic())
                found = self._executor.wait(streams, block_s=block_s, count=_COUNT)
                with self._lock:
                    now_s = time.monotonic()
                    num_news += self._demux.feed(found, now_s=now_s, is_drained=_is_drained(found))
                    unwanted = self._demux.unwanted()
                self._executor.run_many([self._core.unfollow(i) for i in unwanted])
                if num_news >= _TRIM_EVERY:
                    num_news = 0
                    self._executor.run(self._core.trim_news(self._demux.last_news))
                if self._demux.num_waits >= _MANY_WAITS:
                    time.sleep(_PAUSE_S)
        except L4QueueError as error:
            self._fail(error)
        except Exception as error:
            self._fail(ServiceUnavailable(f"the client cannot read what it is told: {error!r}"))
            if not self._is_closed:  # a client that is closed closes this reader's connection under it
                raise

    def _fail(self, error: L4QueueError) -> None:
        with self._lock:
            self._reader = None
            self._demux.fail(error)
