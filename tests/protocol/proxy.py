"""A proxy that cuts connections: before a request reaches the server, or after, so that its reply is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Literal

__all__ = ("Cut", "CuttingProxy")

Cut = Literal["before", "after"] | None
"""Where a chunk of requests is cut: not forwarded, forwarded with its reply dropped, or not cut."""


class CuttingProxy:
    """Listens on its own thread. `plan` says for the n-th chunk with script calls what happens to it."""

    def __init__(self, target_port: int, plan: Callable[[int], Cut], *, delay_s: float = 0.0) -> None:
        self._target_port = target_port
        self._plan = plan
        self._delay_s = delay_s
        self._num_chunks = 0
        self.num_cuts = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self.port = 0

    @property
    def url(self) -> str:
        """Where clients connect instead."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> CuttingProxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        back = asyncio.create_task(self._replies(up_reader, writer))
        try:
            await self._requests(reader, up_reader, up_writer, back)
        except OSError:
            pass
        finally:
            back.cancel()
            writer.transport.abort()
            up_writer.transport.abort()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
        back: asyncio.Task[None],
    ) -> None:
        while data := await reader.read(1 << 20):
            cut = None
            if b"EVALSHA" in data:  # a cut greeting would prove nothing
                cut = self._plan(self._num_chunks)
                self._num_chunks += 1
                self.num_cuts += cut is not None
            if cut == "before":
                return
            if cut == "after":
                back.cancel()
                await asyncio.gather(back, return_exceptions=True)
                up_writer.write(data)
                await up_writer.drain()
                await up_reader.read(1)  # the server has executed it, or at least begun to answer
                return
            up_writer.write(data)
            await up_writer.drain()

    async def _replies(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await up_reader.read(1 << 20):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()
