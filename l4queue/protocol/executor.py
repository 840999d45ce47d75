"""Executors of calls: one blocking, one for asyncio. Batches in a round trip of bounded size, retried as a whole.

Both run the same coroutines. Those of the blocking executor never suspend: they end in the step that begins them.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import redis

from l4queue.protocol.batching import Commands, round_trips
from l4queue.protocol.calls import Arg, Call
from l4queue.protocol.connect import Address, async_pool, connect, parse_url
from l4queue.protocol.foreign import Finding, burial, gathered, set_aside
from l4queue.protocol.reads import StreamEntry, parse_entries
from l4queue.protocol.scripts import all_scripts
from l4queue.protocol.shared_wait import SharedWait
from l4queue.protocol.thin_client import ThinClient
from l4queue.protocol.trouble import FAILURES, outage_of
from l4queue.protocol.wire import (
    Tries,
    Waits,
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
_MAX_BLOCK_S = 30.0  # of one blocking read; under the idle limits of usual proxies
_MIN_BLOCK_S = 1.0  # of one blocking read of a client; chosen: one round trip a second costs nothing
_SOCKET_TIMEOUT_S = 5.0  # for one reply; a script takes milliseconds
_MAX_WAITERS = 4096  # each blocking read holds a connection; Redis accepts 10,000 by default


class _Exchange(ABC):
    """The exchange that both executors share; they add connections and its four primitives, `_one` to `_pause`.

    `retry_s` bounds how long a call is tried again while Redis is away or refuses it; then ServiceUnavailable.
    None means for ever, until `close`: services outlive an outage of Redis. It bounds `longest_read_s` too: a
    server that hangs amid a blocking read is not noticed before its end. `says_outages` logs each outage once;
    by default where it is waited for without end. `socket_timeout_s` bounds a connect, and the wait for one
    reply: 5 s at most, and by default.
    """

    def __init__(
        self,
        url: str,
        *,
        retry_s: float | None = 10.0,
        max_connections: int = 64,
        says_outages: bool | None = None,
        socket_timeout_s: float = 0.0,
    ) -> None:
        self.url = url
        self.retry_s = retry_s
        self.longest_read_s = min(_MAX_BLOCK_S, max(_MIN_BLOCK_S, math.inf if retry_s is None else retry_s))
        says = retry_s is None if says_outages is None else says_outages
        self._outage = outage_of(url) if says else None
        self.waits = Waits(url, retry_s, self._outage)
        address = parse_url(url)
        self._replicas = address.replicas
        self._open(
            address, most=max_connections, socket_s=min(socket_timeout_s or _SOCKET_TIMEOUT_S, _SOCKET_TIMEOUT_S)
        )

    @abstractmethod
    def _open(self, address: Address, *, most: int, socket_s: float) -> None:
        """Make clients for commands, with at most this many connections, and for blocking reads."""

    @abstractmethod
    async def _one(self, words: Sequence[Arg]) -> Any:
        """The reply to one command; errors are raised."""

    @abstractmethod
    async def _pipeline(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        """The replies to commands of one round trip, errors among them."""

    async def _write(self, commands: Sequence[Sequence[Arg]], wait: Sequence[Arg]) -> list[Any]:
        """The replies to commands, and to the one that waits until replicas have what they wrote."""
        return await self._pipeline([*commands, wait])

    @abstractmethod
    async def _read(self, streams: Mapping[str, str], *, count: int, block_ms: int) -> Any:
        """The reply to a blocking read."""

    @abstractmethod
    async def _pause(self, pause_s: float) -> bool:
        """Wait so long; whether the executor was closed meanwhile."""

    async def _run_many(self, calls: Sequence[Call[Any]]) -> list[Any]:
        values: list[Any] = []
        for part in round_trips(calls):
            found, error = await self._try(part, retry_s=self.retry_s)
            if error is not None:
                if len(calls) > 1:
                    error = await self._cause(error)
                raise explain(error, self.url) from error
            values += found
        return values

    async def _cause(self, error: Exception) -> Exception:
        """The error itself, or what a short command is told by a server that hangs up on a long one.

        A server that does not let us in reads no long command to its end.
        """
        if isinstance(error.__cause__ or error.__context__, BrokenPipeError | ConnectionResetError):
            try:
                await self._one(("PING",))
            except FAILURES as found:
                return found
        return error

    async def _offer(self, call: Call[Any]) -> Any:
        found, error = await self._try((call,), retry_s=0.0)
        return None if error is not None else found[0]

    async def _try(
        self, calls: Sequence[Call[Any]], *, retry_s: float | None
    ) -> tuple[list[Any], Exception | None]:
        """The values, or the error by which time ran out."""
        if not calls:
            return [], None
        began_s, tries = time.monotonic(), None  # nearly every exchange comes through at once
        while True:
            try:
                replies = first_error(await self._exchange(calls))
            except FAILURES as error:
                tries = tries or Tries(
                    names_of(calls), url=self.url, retry_s=retry_s, outage=self._outage, began_s=began_s
                )
                if is_foreign(error) and tries.may_clear() and await self._clear(keys_of(calls)):
                    continue
                pause_s = tries.failed(error)
                if pause_s is None or await self._pause(pause_s):
                    return [], error
            else:
                if self._outage is not None and self._outage.is_open:
                    self._outage.passed(names_of(calls))
                with gathered() as found:
                    values = [call.parse(reply) for call, reply in zip(calls, replies, strict=True)]
                if found:
                    await self._bury(found)
                return values, None

    async def _wait(
        self, streams: Mapping[str, str], *, block_s: float, count: int
    ) -> dict[str, list[StreamEntry]]:
        block_ms = max(1, int(min(block_s, self.longest_read_s) * 1000))
        try:
            reply = await self._read(streams, count=count, block_ms=block_ms)
        except FAILURES as error:
            if not (is_foreign(error) and await self._clear(tuple(streams))):
                await self._pause(min(self.waits.failed(error, _READ), block_s))
            return {}
        self.waits.passed(_READ)
        pairs = reply.items() if isinstance(reply, Mapping) else (reply or ())
        return {key.decode(): parse_entries(entries) for key, entries in pairs}

    async def _clear(self, keys: Sequence[str]) -> bool:
        """Set aside what is not ours under these names; whether there was anything."""
        with suppress(*FAILURES):
            return bool(keys) and first_error(await self._exchange([set_aside(keys)]))[0] > 0
        return False

    async def _bury(self, found: Sequence[Finding | None]) -> None:
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
                await self._one(("SCRIPT LOAD", one.source))
            replies[missing:] = await self._send(calls[missing:])
        return replies

    async def _send(self, calls: Sequence[Call[Any]]) -> list[Any]:
        wait, commands = confirmation(calls, self._replicas), Commands.of(calls)
        if len(commands.words) == 1 and wait is None:
            try:
                return commands.replies([await self._one(commands.words[0])])
            except redis.exceptions.NoScriptError as error:
                return commands.replies([error])
        if wait is None:
            return commands.replies(await self._pipeline(commands.words))
        return commands.replies(confirmed(await self._write(commands.words, wait), self._replicas))


class Executor(_Exchange):
    """Blocking executor. Thread-safe: each thread borrows its own connection."""

    def _open(self, address: Address, *, most: int, socket_s: float) -> None:
        pool, waiters = redis.BlockingConnectionPool, redis.ConnectionPool
        self._closed = threading.Event()
        self._client = connect(address, pool=pool, timeout_s=socket_s, most=most, connect_timeout_s=socket_s)
        self._waiter = connect(
            address,
            pool=waiters,
            timeout_s=self.longest_read_s + _SOCKET_TIMEOUT_S,
            most=_MAX_WAITERS,
            connect_timeout_s=socket_s,
        )

    def run(self, call: Call[T]) -> T:
        """Execute one call."""
        value: T = self.run_many((call,))[0]
        return value

    def run_many(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Execute calls in one round trip, in order; all are repeated together when the connection breaks.

        Calls of many megabytes take several round trips, one after the other.
        """
        return _at_once(self._run_many(calls))

    def offer(self, call: Call[T]) -> T | None:
        """Execute one call that may be left out, such as a hint, in one try; None while Redis does not take it."""
        value: T | None = _at_once(self._offer(call))
        return value

    def wait(
        self, streams: Mapping[str, str], *, block_s: float, count: int = 100
    ) -> dict[str, list[StreamEntry]]:
        """Entries after the given ids, as soon as there are any; {} when `block_s` or `longest_read_s` passes."""
        return _at_once(self._wait(streams, block_s=block_s, count=count))

    def close(self) -> None:
        """Close all connections, and give up calls that wait for an outage to end; safe to call twice."""
        self._closed.set()
        self._client.connection_pool.disconnect()
        self._waiter.connection_pool.disconnect()

    async def _one(self, words: Sequence[Arg]) -> Any:
        return self._client.execute_command(*words)

    async def _pipeline(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipe:
            for words in commands:
                pipe.execute_command(*words)
            return list(pipe.execute(raise_on_error=False))

    async def _read(self, streams: Mapping[str, str], *, count: int, block_ms: int) -> Any:
        return self._waiter.xread(dict(streams), count=count, block=block_ms)

    async def _pause(self, pause_s: float) -> bool:
        return self._closed.wait(pause_s)


class AsyncExecutor(_Exchange):
    """The same for asyncio; belongs to the event loop that first uses it, until it is closed."""

    def _open(self, address: Address, *, most: int, socket_s: float) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = SharedWait(self._pipeline)
        wait_s = self.longest_read_s + _SOCKET_TIMEOUT_S
        self.client: Any = ThinClient(
            async_pool(address, timeout_s=socket_s, most=most, connect_timeout_s=socket_s)
        )
        self._waiter: Any = ThinClient(
            async_pool(address, timeout_s=wait_s, most=_MAX_WAITERS, connect_timeout_s=socket_s)
        )

    async def run(self, call: Call[T]) -> T:
        """Execute one call."""
        value: T = (await self.run_many((call,)))[0]
        return value

    def check_loop(self) -> None:
        """RuntimeError on another event loop than that of the first use: connections cannot move."""
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise RuntimeError("this client belongs to another event loop: make one for each, or close it before")

    def is_of_this_loop(self) -> bool:
        """Whether `check_loop` would pass."""
        return self._loop is None or self._loop is asyncio.get_running_loop()

    async def run_many(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """See `Executor.run_many`."""
        self.check_loop()
        return await self._run_many(calls)

    async def offer(self, call: Call[T]) -> T | None:
        """See `Executor.offer`."""
        self.check_loop()
        value: T | None = await self._offer(call)
        return value

    async def wait(
        self, streams: Mapping[str, str], *, block_s: float, count: int = 100
    ) -> dict[str, list[StreamEntry]]:
        """See `Executor.wait`."""
        self.check_loop()
        return await self._wait(streams, block_s=block_s, count=count)

    async def clear(self, keys: Sequence[str]) -> bool:
        """Set aside what is not ours under these names; whether there was anything."""
        return await self._clear(keys)

    async def bury(self, found: Sequence[Finding | None]) -> None:
        """Dead letters of what could not be read; best effort, since it is in the log already."""
        await self._bury(found)

    async def close(self) -> None:
        """Close all connections; safe to call twice."""
        await self.client.close_all()
        await self._waiter.close_all()
        self._loop = None

    async def _one(self, words: Sequence[Arg]) -> Any:
        return await self.client.execute_command(*words)

    async def _pipeline(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        replies: list[Any] = await self.client.run(commands)
        return replies

    async def _write(self, commands: Sequence[Sequence[Arg]], wait: Sequence[Arg]) -> list[Any]:
        return await self._turn.write(commands, wait)

    async def _read(self, streams: Mapping[str, str], *, count: int, block_ms: int) -> Any:
        return await self._waiter.xread(dict(streams), count=count, block=block_ms)

    async def _pause(self, pause_s: float) -> bool:
        await asyncio.sleep(pause_s)
        return False


def _at_once(steps: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that never suspends."""
    try:
        steps.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise RuntimeError("a blocking executor was suspended")
