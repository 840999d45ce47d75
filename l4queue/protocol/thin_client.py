"""redis-py's asyncio client on thin connections: its commands and readers of replies, our way to the server.

Most commands share a few connections. A command that holds its connection up has one of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import redis.asyncio as aredis
import redis.exceptions as rx

from l4queue.protocol.calls import Arg
from l4queue.protocol.thin_connection import CLOSED_HERE, ThinConnection

__all__ = ("ThinClient",)

_MAX_SHARED = 4  # connections for all but what holds one up; the second is opened when the first is full
_HOLDING = frozenset(("XREAD", "XREADGROUP", "WAIT"))  # the server lets nothing pass them
_ENTRIES = frozenset(("XRANGE", "XREVRANGE", "XREAD", "XREADGROUP"))  # `parse_entries` takes them as they come


class ThinClient(aredis.Redis):
    """A client of one event loop, until it is closed. `pool` says how to connect, and how often at once."""

    def __init__(self, pool: aredis.ConnectionPool) -> None:
        super().__init__(connection_pool=pool)
        readers: dict[Any, Any] = dict(self.response_callbacks)
        self._readers = {name: reader for name, reader in readers.items() if name not in _ENTRIES}
        self._shared: list[ThinConnection] = []
        self._idle: list[ThinConnection] = []
        self._lent: set[ThinConnection] = set()
        self._places = asyncio.Semaphore(pool.max_connections)
        self._opening: dict[asyncio.Task[ThinConnection], list[ThinConnection]] = {}
        self._max_shared = min(_MAX_SHARED, pool.max_connections)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """The reply to one command as redis-py reads it; errors are raised."""
        (reply,) = await self.run((args,), **options)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def run(self, commands: Sequence[Sequence[Arg]], **options: Any) -> list[Any]:
        """The replies to commands of one round trip as redis-py reads them, errors among them."""
        is_holding = commands[0][0] in _HOLDING or commands[-1][0] in _HOLDING
        replies = await (self._send_alone(commands) if is_holding else self._send(commands))
        options.pop("keys", None)  # for redis-py's cache
        for index, words in enumerate(commands):
            reader = self._readers.get(words[0])
            if reader is not None and not isinstance(replies[index], Exception):
                replies[index] = reader(replies[index], **options)
        return replies

    async def close_all(self) -> None:
        """Break all connections; what waits for a reply fails. Safe to call twice, and on another loop."""
        opening = [task for task in self._opening if task.get_loop() is asyncio.get_running_loop()]
        self._opening.clear()
        for task in opening:
            task.cancel()
        if opening:
            await asyncio.wait(opening)
        self._break_all()
        self._places = asyncio.Semaphore(self.connection_pool.max_connections)

    def __del__(self, *_: Any) -> None:
        with suppress(RuntimeError, AttributeError):  # another thread, or not made to the end
            loop = asyncio.get_running_loop()
            if all(one.loop is loop for one in (*self._shared, *self._idle)):  # not so in a forked process
                self._break_all()

    def _break_all(self) -> None:
        for connection in (*self._shared, *self._idle, *self._lent):
            with suppress(RuntimeError):  # of a loop that has ended
                connection.give_up(rx.ConnectionError(CLOSED_HERE))
        self._shared.clear()
        self._idle.clear()

    async def _send(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        while True:
            for connection in self._shared:
                if not connection.is_full and connection.error is None:
                    return await connection.send(commands)
            self._shared[:] = [one for one in self._shared if one.error is None]
            if len(self._shared) == self._max_shared:
                return await self._shared[0].send(commands)
            (await self._open(self._shared)).check()

    async def _send_alone(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        async with self._places:
            connection = await self._borrow()
            self._lent.add(connection)
            try:
                replies = await connection.send(commands)
            except BaseException:
                connection.give_up(rx.ConnectionError(CLOSED_HERE))  # nobody will read the reply
                raise
            finally:
                self._lent.discard(connection)
            self._idle.append(connection)
            return replies

    async def _borrow(self) -> ThinConnection:
        while True:
            while self._idle:
                connection = self._idle.pop()
                if connection.error is None:
                    return connection
            (await self._open(self._idle)).check()

    async def _open(self, into: list[ThinConnection]) -> ThinConnection:
        """Add a connection. A task of its own makes it, so that no cancelled caller leaves one half open."""
        task = None
        if into is self._shared:  # one for all
            task = next((task for task, other in self._opening.items() if other is into), None)
        if task is None:
            task = asyncio.create_task(self._connect(into))
            self._opening[task] = into
            task.add_done_callback(self._opened)
        return await asyncio.shield(task)

    async def _connect(self, into: list[ThinConnection]) -> ThinConnection:
        pool = self.connection_pool
        origin: Any = pool.connection_class(**pool.connection_kwargs)
        try:
            await origin.connect()
        except asyncio.CancelledError:
            if asyncio.current_task() in self._opening:
                raise
            raise rx.ConnectionError(CLOSED_HERE) from None  # closed; who waits for it is not cancelled
        connection = ThinConnection(origin)
        into.append(connection)
        return connection

    def _opened(self, task: asyncio.Task[ThinConnection]) -> None:
        self._opening.pop(task, None)
        if not task.cancelled():
            task.exception()  # maybe nobody waits for it any more
