"""A thin asyncio connection to Redis: commands of many tasks share it, written together in a turn of the loop.

redis-py connects, greets and logs in; then its transport is taken over. Replies come in the order of commands.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from copy import copy
from typing import Any

import hiredis
import redis.exceptions as rx
from redis.connection import DefaultParser

from l4queue.protocol.calls import Arg
from l4queue.protocol.connect import mislead
from l4queue.protocol.trouble import FAILURES

__all__ = ("CLOSED_HERE", "ThinConnection")

CLOSED_HERE = "Connection closed by this client."
_CLOSED = "Connection closed by server."  # redis-py's words
_FLUSH_BYTES = 65_536  # of one write; more is written at once, not at the end of the turn
_HIGH_BYTES = 262_144  # unsent; then senders wait. Chosen: a round trip of 0.2 ms at 10 Gbit/s
_NOTHING = object()  # there is no whole reply yet


class _Batch:
    """Commands of one sender, and the replies so far."""

    __slots__ = ("future", "num_commands", "replies")

    def __init__(self, future: asyncio.Future[list[Any]], num_commands: int) -> None:
        self.future = future
        self.num_commands = num_commands
        self.replies: list[Any] = []


class ThinConnection(asyncio.Protocol):
    """One connection, of the loop that it was made on. Once broken it stays so; then `error` says why.

    A server that neither answers nor takes anything for the connection's `socket_timeout` is given up. A cancelled
    sender's replies are dropped, its commands run if they were sent.
    """

    def __init__(self, origin: Any) -> None:
        """Take over a connection of redis-py that has connected and waits for no reply."""
        self.error: Exception | None = None
        self.is_full = False  # senders wait for room
        self._origin = origin
        self.loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(
            protocolError=rx.InvalidResponse, replyError=DefaultParser.parse_error, notEnoughData=_NOTHING
        )
        self._pending: deque[_Batch] = deque()  # one entry for each command
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._has_flush = False  # at the end of this turn
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._moved_s = self.loop.time()  # when the server last showed life, or was first asked
        self._num_written = self._num_sent = 0  # bytes
        # redis-py has no public way to hand over its transport. The writer is kept, since it closes it at its end.
        self._writer = origin._writer
        origin._writer = origin._reader = None
        self._transport: Any = self._writer.transport
        self._transport.set_write_buffer_limits(high=_HIGH_BYTES)
        self._transport.set_protocol(self)
        if self._transport.is_closing():
            self.give_up(rx.ConnectionError(_CLOSED))

    async def send(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        """The replies to commands, in order, errors among them. An error of the connection is raised."""
        batch = _Batch(self.loop.create_future(), len(commands))
        try:
            for words in commands:
                if self.is_full or self._turn.locked():
                    await self._wait_for_room()
                self.check()
                self._put(batch, _pack(words))  # not before: bodies may be long
        except BaseException:
            batch.future.cancel()
            raise
        return await batch.future

    def check(self) -> None:
        """Raise the error that broke it, if it is broken."""
        if self.error is not None:
            raise _told(self.error)

    def give_up(self, error: Exception) -> None:
        """Break the connection: all senders that wait get this error."""
        if self.error is not None:
            return
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
        pending, self._pending = self._pending, deque()
        self._out.clear()
        for batch in pending:
            if not batch.future.done():
                batch.future.set_exception(_told(error))
        self._room.set()
        self._transport.abort()

    def _put(self, batch: _Batch, packed: bytes) -> None:
        if not self._pending:
            self._ask_after_idling()
        is_first = not self._pending
        self._pending.append(batch)
        self._out.append(packed)
        self._out_bytes += len(packed)
        if is_first or self._out_bytes >= _FLUSH_BYTES:
            self._flush()
        elif not self._has_flush:
            self._has_flush = True
            self.loop.call_soon(self._end_turn)

    def _ask_after_idling(self) -> None:
        """The `health_check_interval` of redis-py: a PING first after so long without a reply."""
        now_s = self.loop.time()
        if 0 < self._origin.health_check_interval < now_s - self._moved_s:
            nobody = _Batch(self.loop.create_future(), 1)
            nobody.future.cancel()
            self._pending.append(nobody)
            self._out.append(_pack(("PING",)))
        self._moved_s = now_s
        if self._timer is None and self._origin.socket_timeout:
            self._timer = self.loop.call_later(self._origin.socket_timeout, self._watch)

    def _end_turn(self) -> None:
        self._has_flush = False
        self._flush()

    def _flush(self) -> None:
        out = self._out
        if out:
            data = out[0] if len(out) == 1 else b"".join(out)
            self._out, self._out_bytes = [], 0
            self._num_written += len(data)
            self._transport.write(data)

    async def _wait_for_room(self) -> None:
        async with self._turn:  # first come, first served
            while self.is_full and self.error is None:
                self._room.clear()
                await self._room.wait()

    def _watch(self) -> None:
        """Give a server up that does not move. What it takes is life too: a long body needs its time."""
        self._timer = None
        if not self._pending or self.error is not None:
            return
        now_s, unsent_bytes = self.loop.time(), self._transport.get_write_buffer_size()
        if unsent_bytes and self._num_written - unsent_bytes != self._num_sent:
            self._num_sent, self._moved_s = self._num_written - unsent_bytes, now_s
        left_s = self._moved_s + float(self._origin.socket_timeout or 0) - now_s
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._watch)
        else:
            self.give_up(rx.TimeoutError(f"Timeout reading from {self._where()}"))

    def _where(self) -> str:
        origin = self._origin
        return origin.path if hasattr(origin, "path") else f"{origin.host}:{origin.port}"

    def pause_writing(self) -> None:
        """The server is slower than we are."""
        self.is_full = True

    def resume_writing(self) -> None:
        """It has taken most."""
        self.is_full, self._moved_s = False, self.loop.time()
        self._room.set()

    def data_received(self, data: bytes) -> None:
        """Replies for those who asked first."""
        self._moved_s = self.loop.time()
        reader, pending = self._reader, self._pending
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NOTHING:
                if isinstance(reply, Exception):
                    self._check(reply)
                elif type(reply) is list and reply and isinstance(reply[0], rx.ConnectionError):
                    raise reply[0]
                batch = pending.popleft()
                batch.replies.append(reply)
                if len(batch.replies) == batch.num_commands and not batch.future.done():
                    batch.future.set_result(batch.replies)
        except FAILURES as error:  # IndexError: nobody has asked
            self.give_up(error)

    def _check(self, reply: Exception) -> None:
        """Raise an error after which the connection is of no use."""
        if isinstance(reply, rx.ConnectionError):
            raise reply
        if isinstance(reply, rx.ResponseError) and (reason := mislead(self._origin, reply)) is not None:
            raise rx.ConnectionError(reason) from reply

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended, here or there."""
        error = rx.ConnectionError(_CLOSED)
        if exc is not None:
            error = rx.ConnectionError(f"Error while reading from {self._where()} : {exc.args}")
            error.__cause__ = exc
        self.give_up(error)


def _told(error: Exception) -> Exception:
    """An error of its own for each who waits: tracebacks and causes are added to it."""
    one = copy(error)
    one.__cause__ = error.__cause__
    return one


def _pack(words: Sequence[Arg]) -> bytes:
    """A command as Redis reads it, as redis-py packs it."""
    first = words[0]
    if isinstance(first, str) and " " in first:
        words = (*first.split(), *words[1:])
    try:
        packed: bytes = hiredis.pack_command(tuple(words))  # type: ignore[arg-type]  # any number of them
    except TypeError as error:
        raise rx.DataError(str(error)) from None
    return packed
