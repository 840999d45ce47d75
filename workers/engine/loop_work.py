"""The request that the event loop works for, so that one that holds it up is blamed alone.

Most work for a request is quick. What an engine or a tokenizer does with it is foreign code without a bound.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, TypeVar

from workers.engine.base import EngineDied

__all__ = ("LoopWork", "lease_of")

T = TypeVar("T")
_NOTABLE_S = 0.1  # of CPU time; shorter work explains no late loop


def lease_of(engine_id: str) -> tuple[str, int]:
    """Request and epoch of an id in the engine (`Session.engine_id`)."""
    request_id, _, epoch = engine_id.rpartition(":")
    return request_id, int(epoch)


class LoopWork:
    """Work of one event loop for requests, by their ids in the engine. Other threads may read `current`."""

    def __init__(self) -> None:
        self.current: str | None = None
        self._busy: dict[str, tuple[float, float]] = {}  # CPU time of a long piece, and when it ended
        self._raised: tuple[BaseException, str] | None = None

    def on(self, engine_id: str, *, is_timed: bool = True) -> _Mark:
        """A context in which the loop works for this request, without `await`.

        Reading the clock of the processor takes longer than most work for a token: `is_timed` false spares it.
        """
        return _Mark(self, engine_id, is_timed)

    def steps(self, engine_id: str, work: Coroutine[Any, Any, T]) -> _Steps[T]:
        """The same coroutine, marked whenever the loop is inside it; not while it waits."""
        return _Steps(self, engine_id, work)

    def culprit(self, failure: BaseException | None) -> str | None:
        """The request whose work raised this; None where none did."""
        return self._raised[1] if self._raised is not None and self._raised[0] is failure else None

    def busy_for(self, least_s: float) -> list[str]:
        """Requests for which the loop computed at least so long in one piece, s of CPU time.

        A process that was stopped meanwhile has not computed.
        """
        return [engine_id for engine_id, (busy_s, _) in self._busy.items() if busy_s >= least_s]

    def forget(self, before_s: float) -> None:
        """Forget work that ended before this time (`time.monotonic`)."""
        self._busy = {engine_id: busy for engine_id, busy in self._busy.items() if busy[1] >= before_s}

    def ended(self, engine_id: str, busy_s: float, error: BaseException | None) -> None:
        """A piece of work is over."""
        if busy_s >= _NOTABLE_S:
            longest_s = max(busy_s, self._busy.get(engine_id, (0.0, 0.0))[0])
            self._busy[engine_id] = (longest_s, time.monotonic())
        if isinstance(error, Exception) and not isinstance(error, (EngineDied, StopIteration)):
            self._raised = (error, engine_id)


class _Mark:
    """Marks until it is left; what was marked before counts again then."""

    __slots__ = ("_before", "_began_s", "_engine_id", "_is_timed", "_work")

    def __init__(self, work: LoopWork, engine_id: str, is_timed: bool) -> None:
        self._work, self._engine_id, self._is_timed = work, engine_id, is_timed

    def __enter__(self) -> None:
        self._before, self._work.current = self._work.current, self._engine_id
        self._began_s = time.thread_time() if self._is_timed else 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.current = self._before
        if self._is_timed or error is not None:
            busy_s = time.thread_time() - self._began_s if self._is_timed else 0.0
            self._work.ended(self._engine_id, busy_s, error)


class _Steps(Generic[T]):
    """Awaits a coroutine step by step."""

    def __init__(self, work: LoopWork, engine_id: str, coroutine: Coroutine[Any, Any, T]) -> None:
        self._work, self._engine_id, self._coroutine = work, engine_id, coroutine

    def __await__(self) -> Generator[Any, Any, T]:
        error: BaseException | None = None
        while True:
            try:
                with self._work.on(self._engine_id):
                    waits_for = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
            error = None
            try:
                yield waits_for
            except BaseException as thrown:  # a cancellation, too: the coroutine decides what it means
                error = thrown
