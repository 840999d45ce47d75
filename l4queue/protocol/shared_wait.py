"""A WAIT that callers share: the writes of one turn of the event loop are confirmed by replicas together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from typing import Any

from l4queue.protocol.calls import Arg

__all__ = ("SharedWait",)

_Words = Sequence[Arg]
_Writer = tuple[Sequence[_Words], asyncio.Future[list[Any]]]


class SharedWait:
    """Sends what several tasks write as one pipeline with one WAIT behind it.

    A WAIT holds its connection for a round trip to the replicas: one for each caller takes as many connections.
    A failure is that of each caller. A caller that is cancelled loses its replies, not its writes.
    """

    def __init__(self, send: Callable[[Sequence[_Words]], Awaitable[list[Any]]]) -> None:
        """`send` gives the replies to a pipeline, errors among them."""
        self._send = send
        self._writers: list[_Writer] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def write(self, commands: Sequence[_Words], wait: _Words) -> list[Any]:
        """The replies to these commands, and behind them that of the WAIT."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._writers.append((commands, future))
        if len(self._writers) == 1:
            loop.call_soon(self._begin, wait)
        return await future

    def _begin(self, wait: _Words) -> None:
        writers, self._writers = self._writers, []
        task = asyncio.create_task(self._share(writers, wait))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _share(self, writers: Sequence[_Writer], wait: _Words) -> None:
        try:
            words = [one for commands, _ in writers for one in commands]
            *replies, confirmed = await self._send([*words, wait])
        except Exception as error:
            for _, future in writers:
                if not future.done():
                    future.set_exception(_own(error))
            return
        except BaseException:
            for _, future in writers:
                future.cancel()
            raise
        begin = 0
        for commands, future in writers:
            end = begin + len(commands)
            if not future.done():
                future.set_result([*replies[begin:end], confirmed])
            begin = end


def _own(error: Exception) -> Exception:
    """An error of its own for each who waits: tracebacks and causes are added to it."""
    one = copy(error)
    one.__cause__ = error.__cause__
    return one
