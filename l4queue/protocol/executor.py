"""Executors of calls: one blocking, one for asyncio. Batches in one round trip, retried as a whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import redis
import redis.asyncio as aredis

from l4queue.protocol.calls import Call
from l4queue.protocol.connect import connect, connect_async, parse_url
from l4queue.protocol.foreign import Finding, burial, gathered, set_aside
from l4queue.protocol.reads import StreamEntry, parse_entries
from l4queue.protocol.scripts import all_scripts
from l4queue.protocol.trouble import FAILURES, Outage, outage_of
from l4queue.protocol.wire import (
    Tries,
    Waits,
    command,
    confirmation,
    confirmed,
    explain,
    first_error,
    first_missing,
    is_foreign,
    keys_of,
    names_of,
)

__all__ = ("AsyncExecutor", "Executor")

T = TypeVar("T")
_READ = "XREAD"
_MAX_BLOCK_S = 30.0
_SOCKET_TIMEOUT_S = 5.0
_MAX_WAITERS = 4096  # each blocking read holds a connection; Redis accepts 10,000 by default


class Executor:
    """Blocking executor. Thread-safe: each thread borrows its own connection.

    `retry_s` bounds how long a call is tried again while Redis is away or refuses it; then ServiceUnavailable.
    None means for ever, until `close`: services outlive an outage of Redis. `says_outages` logs each outage once;
    by default where it is waited for without end.
    """

    def __init__(
        self,
        url: str,
        *,
        retry_s: float | None = 10.0,
        max_connections: int = 64,
        says_outages: bool | None = None,
    ) -> None:
        self.url = url
        self.retry_s = retry_s
        self._outage = _outage(url, retry_s, says_outages)
        self.waits = Waits(url, retry_s, self._outage)
        self._closed = threading.Event()
        address = parse_url(url)
        pool, waiters = redis.BlockingConnectionPool, redis.ConnectionPool
        self._client = connect(address, pool=pool, timeout_s=_SOCKET_TIMEOUT_S, most=max_connections)
        self._waiter = connect(address, pool=waiters, timeout_s=_MAX_BLOCK_S + 5.0, most=_MAX_WAITERS)
        self._replicas = address.replicas

    def run(self, call: Call[T]) -> T:
        """Execute one call."""
        value: T = self.run_many((call,))[0]
        return value

    def run_many(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Execute calls in one round trip, in order; all are repeated together when the connection breaks."""
        found, error = self._try(calls, retry_s=self.retry_s)
        if error is not None:
            raise explain(error, self.url) from error
        return found

    def offer(self, call: Call[T]) -> T | None:
        """Execute one call that may be left out, such as a hint, in one try; None while Redis does not take it."""
        found, error = self._try((call,), retry_s=0.0)
        return None if error is not None else found[0]

    def _try(self, calls: Sequence[Call[Any]], *, retry_s: float | None) -> tuple[list[Any], Exception | None]:
        """The values, or the error by which time ran out."""
        if not calls:
            return [], None
        tries = Tries(names_of(calls), url=self.url, retry_s=retry_s, outage=self._outage)
        while True:
            try:
                replies = first_error(self._exchange(calls))
            except FAILURES as error:
                if is_foreign(error) and tries.may_clear() and self._clear(keys_of(calls)):
                    continue
                pause_s = tries.failed(error)
                if pause_s is None or self._closed.wait(pause_s):
                    return [], error
            else:
                tries.passed()
                with gathered() as found:
                    values = [call.parse(reply) for call, reply in zip(calls, replies, strict=True)]
                self._bury(found)
                return values, None

    def wait(
        self, streams: Mapping[str, str], *, block_s: float, count: int = 100
    ) -> dict[str, list[StreamEntry]]:
        """Entries after the given ids, as soon as there are any; {} when `block_s` (at most 30) passes."""
        block_ms = max(1, int(min(block_s, _MAX_BLOCK_S) * 1000))
        try:
            reply = self._waiter.xread(dict(streams), count=count, block=block_ms)
        except FAILURES as error:
            if not (is_foreign(error) and self._clear(tuple(streams))):
                self._closed.wait(min(self.waits.failed(error, _READ), block_s))
            return {}
        self.waits.passed(_READ)
        return _by_stream(reply)

    def _clear(self, keys: Sequence[str]) -> bool:
        """Set aside what is not ours under these names; whether there was anything."""
        with suppress(*FAILURES):
            return bool(keys) and first_error(self._exchange([set_aside(keys)]))[0] > 0
        return False

    def _bury(self, found: Sequence[Finding]) -> None:
        """Dead letters of what could not be read; best effort, since it is in the log already."""
        calls = [call for call in map(burial, found) if call is not None]
        if calls:
            with suppress(*FAILURES):
                self._exchange(calls)

    def _exchange(self, calls: Sequence[Call[Any]]) -> list[Any]:
        replies = self._send(calls)
        missing = first_missing(replies)
        if missing is not None:
            for one in all_scripts():
                self._client.script_load(one.source)
            replies[missing:] = self._send(calls[missing:])
        return replies

    def _send(self, calls: Sequence[Call[Any]]) -> list[Any]:
        wait = confirmation(calls, self._replicas)
        if len(calls) == 1 and wait is None:
            try:
                return [self._client.execute_command(*command(calls[0]))]
            except redis.exceptions.NoScriptError as error:
                return [error]
        with self._client.pipeline(transaction=False) as pipe:
            for call in calls:
                pipe.execute_command(*command(call))
            if wait is not None:
                pipe.execute_command(*wait)
            replies = list(pipe.execute(raise_on_error=False))
        return replies if wait is None else confirmed(replies, self._replicas)

    def close(self) -> None:
        """Close all connections, and give up calls that wait for an outage to end; safe to call twice."""
        self._closed.set()
        self._client.connection_pool.disconnect()
        self._waiter.connection_pool.disconnect()


class AsyncExecutor:
    """The same for asyncio; belongs to the event loop that first uses it."""

    def __init__(
        self,
        url: str,
        *,
        retry_s: float | None = 10.0,
        max_connections: int = 64,
        says_outages: bool | None = None,
    ) -> None:
        self.url = url
        self.retry_s = retry_s
        self._outage = _outage(url, retry_s, says_outages)
        self.waits = Waits(url, retry_s, self._outage)
        address = parse_url(url)
        pool, waiters = aredis.BlockingConnectionPool, aredis.ConnectionPool
        self.client = connect_async(address, pool=pool, timeout_s=_SOCKET_TIMEOUT_S, most=max_connections)
        self._waiter = connect_async(address, pool=waiters, timeout_s=_MAX_BLOCK_S + 5.0, most=_MAX_WAITERS)
        self._replicas = address.replicas

    async def run(self, call: Call[T]) -> T:
        """Execute one call."""
        value: T = (await self.run_many((call,)))[0]
        return value

    async def run_many(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Execute calls in one round trip, in order; all are repeated together when the connection breaks."""
        found, error = await self._try(calls, retry_s=self.retry_s)
        if error is not None:
            raise explain(error, self.url) from error
        return found

    async def offer(self, call: Call[T]) -> T | None:
        """Execute one call that may be left out, such as a hint, in one try; None while Redis does not take it."""
        found, error = await self._try((call,), retry_s=0.0)
        return None if error is not None else found[0]

    async def _try(
        self, calls: Sequence[Call[Any]], *, retry_s: float | None
    ) -> tuple[list[Any], Exception | None]:
        """The values, or the error by which time ran out."""
        if not calls:
            return [], None
        tries = Tries(names_of(calls), url=self.url, retry_s=retry_s, outage=self._outage)
        while True:
            try:
                replies = first_error(await self._exchange(calls))
            except FAILURES as error:
                if is_foreign(error) and tries.may_clear() and await self.clear(keys_of(calls)):
                    continue
                pause_s = tries.failed(error)
                if pause_s is None:
                    return [], error
                await asyncio.sleep(pause_s)
            else:
                tries.passed()
                with gathered() as found:
                    values = [call.parse(reply) for call, reply in zip(calls, replies, strict=True)]
                await self.bury(found)
                return values, None

    async def wait(
        self, streams: Mapping[str, str], *, block_s: float, count: int = 100
    ) -> dict[str, list[StreamEntry]]:
        """Entries after the given ids, as soon as there are any; {} when `block_s` (at most 30) passes."""
        block_ms = max(1, int(min(block_s, _MAX_BLOCK_S) * 1000))
        try:
            reply = await self._waiter.xread(dict(streams), count=count, block=block_ms)
        except FAILURES as error:
            if not (is_foreign(error) and await self.clear(tuple(streams))):
                await asyncio.sleep(min(self.waits.failed(error, _READ), block_s))
            return {}
        self.waits.passed(_READ)
        return _by_stream(reply)

    async def clear(self, keys: Sequence[str]) -> bool:
        """Set aside what is not ours under these names; whether there was anything."""
        with suppress(*FAILURES):
            return bool(keys) and first_error(await self._exchange([set_aside(keys)]))[0] > 0
        return False

    async def bury(self, found: Sequence[Finding | None]) -> None:
        """Dead letters of what could not be read; best effort, since it is in the log already."""
        calls = [call for one in found if one is not None and (call := burial(one)) is not None]
        if calls:
            with suppress(*FAILURES):
                await self._exchange(calls)

    async def _exchange(self, calls: Sequence[Call[Any]]) -> list[Any]:
        replies = await self._send(calls)
        missing = first_missing(replies)
        if missing is not None:
            for one in all_scripts():
                await self.client.script_load(one.source)
            replies[missing:] = await self._send(calls[missing:])
        return replies

    async def _send(self, calls: Sequence[Call[Any]]) -> list[Any]:
        wait = confirmation(calls, self._replicas)
        if len(calls) == 1 and wait is None:
            try:
                return [await self.client.execute_command(*command(calls[0]))]
            except redis.exceptions.NoScriptError as error:
                return [error]
        async with self.client.pipeline(transaction=False) as pipe:
            for call in calls:
                pipe.execute_command(*command(call))
            if wait is not None:
                pipe.execute_command(*wait)
            replies = list(await pipe.execute(raise_on_error=False))
        return replies if wait is None else confirmed(replies, self._replicas)

    async def close(self) -> None:
        """Close all connections; safe to call twice."""
        await self.client.connection_pool.disconnect()
        await self._waiter.connection_pool.disconnect()


def _outage(url: str, retry_s: float | None, says_outages: bool | None) -> Outage | None:
    return outage_of(url) if (retry_s is None if says_outages is None else says_outages) else None


def _by_stream(reply: Any) -> dict[str, list[StreamEntry]]:
    pairs = reply.items() if isinstance(reply, Mapping) else (reply or ())
    return {key.decode(): parse_entries(entries) for key, entries in pairs}
