"""Faults at the door: before or after a chosen call of a script the process dies, or its connection is cut."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from redis.exceptions import ConnectionError as Cut

from l4queue.protocol.calls import Call
from l4queue.protocol.executor import AsyncExecutor, Executor

__all__ = ("Faults", "FaultyBlockingExecutor", "FaultyExecutor", "Fuse", "Kind", "Point", "Side")


class Side(StrEnum):
    """Whether the script has run when the fault strikes."""

    BEFORE = "before"
    AFTER = "after"


class Kind(StrEnum):
    """What happens to the process that called it."""

    KILL = "kill"  # SIGKILL, to itself
    CUT = "cut"  # the reply is lost with the connection; the process goes on


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A place to strike: this process's calls of one script, on one side."""

    role: str
    script: str
    side: Side
    kind: Kind


@dataclass(frozen=True, slots=True)
class Fuse:
    """Strike there at the n-th call of this process, or the next that no other fuse takes; once."""

    point: Point
    nth: int


class Faults:
    """The fuses of one process. Each strike is written down before it happens."""

    def __init__(self, fuses: Sequence[Fuse], journal: Path | None) -> None:
        self._fuses = list(fuses)
        self._journal = journal
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def strike(self, calls: Sequence[Call[Any]]) -> tuple[int, Point] | None:
        """How many of these calls still reach the server, and where it strikes; None: it does not."""
        with self._lock:  # a worker has a door in another thread
            for index, call in enumerate(calls):
                if call.script is None:
                    continue
                self._seen[call.script] += 1
                for fuse in self._fuses:
                    if fuse.point.script == call.script and self._seen[call.script] >= fuse.nth:
                        self._fuses.remove(fuse)
                        return index + (fuse.point.side is Side.AFTER), fuse.point
        return None

    def burn(self, point: Point) -> None:
        """Note the strike; of a kill nobody returns."""
        if self._journal is not None:
            line = f"{point.role} {point.script} {point.side} {point.kind}\n"
            handle = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, line.encode())
            os.close(handle)
        if point.kind is Kind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)


class FaultyExecutor(AsyncExecutor):
    """A door whose process carries faults. Of a pipeline that is struck the calls before it have run."""

    faults = Faults((), None)  # of the process; set by its entry point

    async def _send(self, calls: Sequence[Call[Any]]) -> list[Any]:
        struck = self.faults.strike(calls)
        if struck is None:
            return await super()._send(calls)
        num_sent, point = struck
        if num_sent:
            await super()._send(calls[:num_sent])
        self.faults.burn(point)
        await self.client.connection_pool.disconnect(inuse_connections=False)
        raise Cut(f"cut {point.side} {point.script}")


class FaultyBlockingExecutor(Executor):
    """The same for threads: what keeps a worker's lease."""

    def _send(self, calls: Sequence[Call[Any]]) -> list[Any]:
        struck = FaultyExecutor.faults.strike(calls)
        if struck is None:
            return super()._send(calls)
        num_sent, point = struck
        if num_sent:
            super()._send(calls[:num_sent])
        FaultyExecutor.faults.burn(point)
        self.close()
        raise Cut(f"cut {point.side} {point.script}")
