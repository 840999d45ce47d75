"""A bare connection to Redis for the benchmark's own questions: it packs, sends and reads, and nothing else.

It is no door for the product: no retries, no timeouts, no TLS. So what it costs is as little as Python can do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import hiredis

from l4queue.errors import ServiceUnavailable
from l4queue.redis_url import SecretUrl

__all__ = ("RawConnection", "packed")

_READ_BYTES = 1 << 16  # of one read from the socket; chosen: a pipeline of replies to short commands


def packed(*words: str | bytes | int) -> bytes:
    """One command as Redis reads it."""
    command: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub has a tuple of one
    return command


class RawConnection:
    """One connection; one task at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._parser = hiredis.Reader()

    @classmethod
    async def open(cls, url: SecretUrl) -> RawConnection:
        """Connect and log in to a server on this machine."""
        parts = urlsplit(url.reveal())
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        connection = cls(reader, writer)
        if parts.password:
            await connection.call("AUTH", parts.password)
        return connection

    async def call(self, *words: str | bytes | int) -> Any:
        """The reply to one command; ServiceUnavailable for an error."""
        return (await self.pipeline(packed(*words), num_replies=1))[0]

    async def pipeline(self, commands: bytes, *, num_replies: int) -> Sequence[Any]:
        """Replies to commands that are packed already."""
        self._writer.write(commands)
        await self._writer.drain()
        replies: list[Any] = []
        while len(replies) < num_replies:
            reply = self._parser.gets()
            if reply is False:
                await self._feed()
                continue
            if isinstance(reply, hiredis.HiredisError):
                raise ServiceUnavailable(f"Redis refuses a command of the benchmark: {reply}")
            replies.append(reply)
        return replies

    async def pushed(self) -> AsyncIterator[bytes]:
        """Lines of MONITOR, after it was called."""
        while True:
            reply = self._parser.gets()
            if reply is False:
                await self._feed()
            else:
                yield reply

    async def _feed(self) -> None:
        data = await self._reader.read(_READ_BYTES)
        if not data:
            raise ServiceUnavailable("Redis has hung up on the benchmark")
        self._parser.feed(data)

    async def close(self) -> None:
        """Hang up."""
        self._writer.close()
