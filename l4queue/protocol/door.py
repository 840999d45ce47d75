"""Executors of calls: one blocking, one for asyncio. Batches in one round trip, retried as a whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import redis
import redis.asyncio as aredis
from redis.exceptions import RedisError

from l4queue.protocol.calls import Call
from l4queue.protocol.connect import connect, connect_async, parse_url
from l4queue.protocol.foreign import Finding, burial, gathered, set_aside
from l4queue.protocol.reads import StreamEntry, parse_entries
from l4queue.protocol.scripts import all_scripts
from l4queue.protocol.wire import (
    backoff_s,
    command,
    confirmation,
    confirmed,
    explain,
    first_missing,
    is_foreign,
    is_passing,
    keys_of,
    parse_replies,
)

__all__ = ("AsyncDoor", "Door")

T = TypeVar("T")
_MAX_BLOCK_S = 30.0
_SOCKET_TIMEOUT_S = 5.0
_MAX_WAITERS = 4096  # each blocking read holds a connection; Redis accepts 10,000 by default


class Door:
    """Blocking executor. Thread-safe: each thread borrows its own connection.

    `retry_s` bounds how long a call is tried again while Redis is away; then ServiceUnavailable.
    """

    def __init__(self, url: str, *, retry_s: float = 10.0, max_connections: int = 64) -> None:
        self.url = url
        self.retry_s = retry_s
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
        if not calls:
            return []
        deadline = time.monotonic() + self.retry_s
        was_cleared = False
        for pause_s in backoff_s():
            try:
                with gathered() as found:
                    values = parse_replies(calls, self._exchange(calls))
                self._bury(found)
                return values
            except RedisError as error:
                if is_foreign(error) and not was_cleared:
                    was_cleared = self._clear(keys_of(calls))
                    continue
                if not is_passing(error) or time.monotonic() + pause_s > deadline:
                    raise explain(error, self.url) from error
            time.sleep(pause_s)
        raise AssertionError("unreachable")

    def wait(
        self, streams: Mapping[str, str], *, block_s: float, count: int = 100
    ) -> dict[str, list[StreamEntry]]:
        """Entries after the given ids, as soon as there are any; {} when `block_s` (at most 30) passes."""
        block_ms = max(1, int(min(block_s, _MAX_BLOCK_S) * 1000))
        try:
            reply = self._waiter.xread(dict(streams), count=count, block=block_ms)
        except RedisError as error:
            if is_foreign(error) and self._clear(tuple(streams)):
                return {}
            if not is_passing(error):
                raise explain(error, self.url) from error
            time.sleep(min(0.1, block_s))
            return {}
        return _by_stream(reply)

    def _clear(self, keys: Sequence[str]) -> bool:
        """Set aside what is not ours under these names; whether there was anything."""
        try:
            return bool(keys) and parse_replies(call := [set_aside(keys)], self._exchange(call))[0] > 0
        except RedisError as error:
            raise explain(error, self.url) from error

    def _bury(self, found: Sequence[Finding]) -> None:
        """Dead letters of what could not be read; best effort, since it is in the log already."""
        calls = [call for call in map(burial, found) if call is not None]
        if calls:
            with suppress(RedisError):
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
        """Close all connections; safe to call twice."""
        self._client.connection_pool.disconnect()
        self._waiter.connection_pool.disconnect()


class AsyncDoor:
    """The same for asyncio; belongs to the event loop that first uses it.

    `retry_s` None means for ever: services outlive an outage of Redis.
    """

    def __init__(self, url: str, *, retry_s: float | None = 10.0, max_connections: int = 64) -> None:
        self.url = url
        self.retry_s = retry_s
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
        if not calls:
            return []
        deadline = None if self.retry_s is None else time.monotonic() + self.retry_s
        was_cleared = False
        for pause_s in backoff_s():
            try:
                replies = await self._exchange(calls)
                with gathered() as found:
                    values = parse_replies(calls, replies)
                await self.bury(found)
                return values
            except RedisError as error:
                if is_foreign(error) and not was_cleared:
                    was_cleared = await self.clear(keys_of(calls))
                    continue
                out_of_time = deadline is not None and time.monotonic() + pause_s > deadline
                if not is_passing(error) or out_of_time:
                    raise explain(error, self.url) from error
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    async def wait(
        self, streams: Mapping[str, str], *, block_s: float, count: int = 100
    ) -> dict[str, list[StreamEntry]]:
        """Entries after the given ids, as soon as there are any; {} when `block_s` (at most 30) passes."""
        block_ms = max(1, int(min(block_s, _MAX_BLOCK_S) * 1000))
        try:
            reply = await self._waiter.xread(dict(streams), count=count, block=block_ms)
        except RedisError as error:
            if is_foreign(error) and await self.clear(tuple(streams)):
                return {}
            if not is_passing(error):
                raise explain(error, self.url) from error
            await asyncio.sleep(min(0.1, block_s))
            return {}
        return _by_stream(reply)

    async def clear(self, keys: Sequence[str]) -> bool:
        """Set aside what is not ours under these names; whether there was anything."""
        try:
            return bool(keys) and parse_replies(call := [set_aside(keys)], await self._exchange(call))[0] > 0
        except RedisError as error:
            raise explain(error, self.url) from error

    async def bury(self, found: Sequence[Finding | None]) -> None:
        """Dead letters of what could not be read; best effort, since it is in the log already."""
        calls = [call for one in found if one is not None and (call := burial(one)) is not None]
        if calls:
            with suppress(RedisError):
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


def _by_stream(reply: Any) -> dict[str, list[StreamEntry]]:
    pairs = reply.items() if isinstance(reply, Mapping) else (reply or ())
    return {key.decode(): parse_entries(entries) for key, entries in pairs}
