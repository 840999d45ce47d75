"""The thread that keeps a worker's lease while its event loop is held up.

Foreign code on the loop (an engine that checks a grammar, a tokenizer) may take much longer than a lease. Nobody
is to lose its requests for that. Where the loop does not come back, the thread gives up in its place.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from l4queue.config import Settings
from l4queue.errors import ServiceUnavailable
from l4queue.protocol.calls import Call, Calls, Verdict
from l4queue.protocol.executor import Executor
from workers.engine.loop_work import LoopWork, lease_of
from workers.process.guard import end_process

__all__ = ("LeaseThread",)

log = logging.getLogger("l4queue.worker")
_MOST_TICK_S = 1.0
"""Longest pause between two looks of the keeper, s. Chosen: under a long lease it is still soon
seen that the loop stands still."""
_FAREWELL_S = 5.0  # for what is told to Redis before the end, and for the other keepers of this process
_changed = threading.Condition()
_in_force: set[LeaseThread] = set()  # of this process: its last one to give up ends it


class LeaseThread:
    """Extends the lease of `incarnation()` before half of it has passed without a renewal, while the loop answers.

    A loop that does not answer is waited for, `stall_limit_s` long. Then the request it works for is given back
    with blame, all others without, and the process ends. Only time in which this thread runs counts: a process
    that is stopped does not stall.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        calls: Calls,
        incarnation: Callable[[], str],
        renewed_s: Callable[[], float],
        work: LoopWork,
        on_lost: Callable[[], None],
    ) -> None:
        """`renewed_s` is when the loop renewed it last, on the monotonic clock.

        `on_lost` is called on the loop when the lease was found to be lost.
        """
        self._settings = settings
        self._calls = calls
        self._incarnation = incarnation
        self._renewed_s = renewed_s
        self._extended_s = 0.0
        self._work = work
        self._on_lost = on_lost
        self._tick_s = min(_MOST_TICK_S, settings.lease_s / 3)
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = self._answered = 0
        self._thread = threading.Thread(target=self._run, name="l4-lease", daemon=True)

    def start(self) -> None:
        """Begin, on the loop that is to be watched."""
        self._loop = asyncio.get_running_loop()
        with _changed:
            _in_force.add(self)
        self._thread.start()

    def stop(self) -> None:
        """End soon; safe to call twice, and before `start`."""
        self._stopping.set()
        self._leave()

    def _run(self) -> None:
        executor = Executor(self._settings.redis_url, retry_s=0.0, max_connections=1)
        try:
            self._keep(executor)
        finally:
            executor.close()
            self._leave()

    def _keep(self, executor: Executor) -> None:
        stalled_s, looked_s = 0.0, time.monotonic()
        while not self._stopping.wait(self._tick_s):
            now_s = time.monotonic()
            if self._answered == self._asked:
                stalled_s = 0.0
                if not self._tell_loop(self._answer, self._asked + 1):
                    return
                self._asked += 1
            else:
                stalled_s += min(now_s - looked_s, 2 * self._tick_s)
            looked_s = now_s
            if stalled_s > self._settings.stall_limit_s:
                self._give_up(stalled_s)
                return
            self._extend(executor)

    def _extend(self, executor: Executor) -> None:
        began_s = time.monotonic()
        age_s = began_s - max(self._renewed_s(), self._extended_s)
        if age_s + self._tick_s <= self._settings.lease_s / 2:
            return
        call = self._calls.extend(self._incarnation(), lease_ms=int(self._settings.lease_s * 1000))
        try:
            verdict = executor.run(call)
        except ServiceUnavailable as error:  # tried again with the next tick
            log.debug("lease not renewed: %s", error)
            return
        if verdict is not Verdict.LOST:
            self._extended_s = began_s
        elif not self._stopping.is_set():
            self._tell_loop(self._on_lost)

    def _give_up(self, stalled_s: float) -> None:
        current, incarnation = self._work.current, self._incarnation()
        log.critical("the event loop has stood still for %.0f s, for request %s", stalled_s, current)
        calls: list[Call[Any]] = []
        if current is not None:
            request_id, epoch = lease_of(current)
            most = self._settings.max_crashes
            calls.append(
                self._calls.release(request_id, incarnation=incarnation, epoch=epoch, blame=True, max_crashes=most)
            )
        calls.append(self._calls.retire(incarnation))
        executor = Executor(self._settings.redis_url, retry_s=_FAREWELL_S, max_connections=1)
        try:
            executor.run_many(calls)
        except ServiceUnavailable as error:
            log.error("nothing was given back: %s", error)
        self._leave()
        with _changed:
            _changed.wait_for(lambda: not _in_force, timeout=_FAREWELL_S)
        end_process()

    def _tell_loop(self, function: Callable[..., None], *args: object) -> bool:
        """Call this on the loop; False where it is closed."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            return False
        return True

    def _answer(self, number: int) -> None:
        self._answered = number

    def _leave(self) -> None:
        with _changed:
            _in_force.discard(self)
            _changed.notify_all()
