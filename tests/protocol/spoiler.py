"""A proxy that spoils replies: it stops amid one, hangs up amid one, or says something else; or it is slow."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Literal

__all__ = ("Spoiler", "Spoiling")

Spoiling = Literal["hang", "close", "garbage", "unasked"]
_CHUNK_BYTES = 65_536  # of one read


class Spoiler:
    """Between a client and a server, on the test's loop. `plan` is for the next reply to an ECHO.

    With `pause_s` it takes commands slowly: so long for each 64 KiB.
    """

    def __init__(self, target_port: int, *, pause_s: float = 0.0) -> None:
        self._target_port = target_port
        self._pause_s = pause_s
        self._is_due = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.plan: Spoiling | None = None
        self.num_connections = 0
        self.url = ""

    async def __aenter__(self) -> Spoiler:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_CHUNK_BYTES)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        back = asyncio.create_task(self._replies(up_reader, writer))
        task = asyncio.current_task()
        assert task is not None
        self._tasks |= {task, back}
        try:
            while data := await reader.read(_CHUNK_BYTES):
                self._is_due = self._is_due or (self.plan is not None and b"ECHO" in data)
                up_writer.write(data)
                await up_writer.drain()
                await asyncio.sleep(self._pause_s)
        except (OSError, asyncio.CancelledError):  # asyncio logs a cancelled server task as an error
            pass
        finally:
            back.cancel()
            up_writer.transport.abort()
            writer.transport.abort()

    async def _replies(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while reply := await up_reader.read(_CHUNK_BYTES):
                if self._is_due:
                    await self._spoil(writer, reply)
                    break
                writer.write(reply)
                await writer.drain()
        writer.transport.abort()

    async def _spoil(self, writer: asyncio.StreamWriter, reply: bytes) -> None:
        plan, self.plan, self._is_due = self.plan, None, False
        if plan == "unasked":
            writer.write(reply + b"+OK\r\n" * 10_000)
        else:
            writer.write(b"HTTP/1.1 400\r\n" if plan == "garbage" else reply[: len(reply) // 2 + 1])
        await writer.drain()
        if plan == "hang":
            await asyncio.Event().wait()
