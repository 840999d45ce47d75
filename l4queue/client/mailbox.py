"""One blocking read for all results that an asyncio client waits for: its mailbox stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from l4queue.client.waiting import RECHECK_S
from l4queue.protocol.door import AsyncDoor
from l4queue.protocol.foreign import text

__all__ = ("Mailbox",)


class Mailbox:
    """Wakes whoever waits for a request of this client to end. Reads only while somebody waits.

    A wake-up is a hint: the waiter looks at the record itself.
    """

    def __init__(self, door: AsyncDoor, key: str) -> None:
        self._door = door
        self._key = key
        self._last_id = "0-0"
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def until(
        self, request_id: str, has_ended: Callable[[], Awaitable[bool]], *, time_left_s: Callable[[], float]
    ) -> None:
        """Return once `has_ended` says so. It is asked at the start, at a wake-up and every RECHECK_S.

        `time_left_s` is asked before each wait and raises when time is up.
        """
        while True:
            future = asyncio.get_running_loop().create_future()
            waiters = self._waiting.setdefault(request_id, [])
            waiters.append(future)  # before the question: an end between question and wait is not missed
            try:
                if await has_ended():
                    return
                if self._reader is None or self._reader.done():
                    self._reader = asyncio.create_task(self._read())
                await asyncio.wait({future}, timeout=min(time_left_s(), RECHECK_S))
            finally:
                waiters.remove(future)
                if not waiters:
                    self._waiting.pop(request_id, None)

    async def close(self) -> None:
        """End the reader; whoever still waits runs into its timeout."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while self._waiting:
                found = await self._door.wait({self._key: self._last_id}, block_s=RECHECK_S, count=1000)
                for entry_id, values in found.get(self._key, ()):
                    self._last_id = entry_id.decode()
                    self._wake(self._waiting.get(text(values.get(b"i", b"")), ()))
        finally:
            for waiters in list(self._waiting.values()):  # after an error of Redis: let everybody look
                self._wake(waiters)

    @staticmethod
    def _wake(waiters: Sequence[asyncio.Future[None]]) -> None:
        for future in waiters:
            if not future.done():
                future.set_result(None)
