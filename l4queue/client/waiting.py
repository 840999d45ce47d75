"""Deadlines of blocking waits."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

from l4queue.client.demux import RequestWatch
from l4queue.errors import InvalidRequest, ResultTimeout

__all__ = ("Ends", "deadline_after", "is_patient", "time_left_s", "wait_async")

H = TypeVar("H", bound=Any)

_LONGEST_S = 1e9  # 30 years; operating systems refuse an infinite wait
_PATIENT_S = 2.0
"""Chosen: the first look at a silent request comes after one second, and takes less than another."""
_IT_GOES_ON, _THEY_GO_ON = "it goes on: wait again or cancel it", "they go on: wait again or cancel them"


def deadline_after(timeout: float | None) -> float | None:
    """The monotonic time at which a wait of `timeout` seconds ends; None waits for ever.

    InvalidRequest for what is no number of seconds.
    """
    if timeout is None:
        return None
    try:
        seconds = float(min(timeout, _LONGEST_S))
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if math.isnan(seconds):
        raise InvalidRequest("must be a number of seconds, or None", field="timeout")
    return time.monotonic() + seconds


def is_patient(deadline: float | None) -> bool:
    """Whether a wait may learn a second late of an end that mail has not told."""
    return deadline is None or deadline - time.monotonic() > _PATIENT_S


def time_left_s(deadline: float | None, what: str, *, rest: str = _IT_GOES_ON) -> float | None:
    """Seconds until the deadline, None without one; ResultTimeout once it has passed."""
    if deadline is None:
        return None
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise ResultTimeout(f"{what}; {rest}")
    return left_s


async def wait_async(event: asyncio.Event, left_s: float | None) -> None:
    """Return when the event is set or the time has passed."""
    if left_s is None:
        await event.wait()
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(left_s):
            await event.wait()


class Ends(Generic[H]):
    """Waits for the ends of many requests: one watch each, and one event for all.

    A handle that is given twice counts once; two handles of one request are two.
    """

    def __init__(
        self,
        handles: Iterable[H],
        *,
        has_mail: Callable[[H], bool],
        event: asyncio.Event | threading.Event,
        asks: bool = True,
    ) -> None:
        """`asks` is as for `RequestWatch`."""
        self._event = event
        self._asks = asks
        self._pending: dict[str, dict[int, H]] = {}
        for handle in handles:
            if not isinstance(getattr(handle, "id", None), str):
                raise InvalidRequest("must be handles: `get` makes one of an id", field="handles")
            self._pending.setdefault(handle.id, {})[id(handle)] = handle
        self._woken: deque[RequestWatch] = deque()
        self.watches = [self._watch(list(same.values()), has_mail) for same in self._pending.values()]

    @property
    def num_pending(self) -> int:
        """Requests whose end was not taken yet."""
        return len(self._pending)

    def left_s(self, deadline: float | None) -> float | None:
        """See `time_left_s`, for all that are pending."""
        if self.num_pending == 1:
            return time_left_s(deadline, "1 request is not finished")
        return time_left_s(deadline, f"{self.num_pending} requests are not finished", rest=_THEY_GO_ON)

    def take(self) -> Iterator[H]:
        """Handles of requests that have ended since, in order; the error of one whose wait failed."""
        while self._woken:
            watch = self._woken.popleft()
            if watch.error is not None:
                watch.take()
            if watch.is_over:
                for handle in self._pending.pop(watch.request_id, {}).values():
                    handle._ended(watch.state)
                    yield handle

    def _watch(self, same: list[H], has_mail: Callable[[H], bool]) -> RequestWatch:
        watch = RequestWatch(same[0].id, wake=self._event.set, has_mail=any(map(has_mail, same)), asks=self._asks)
        watch.wake = partial(self._wake, watch)
        return watch

    def _wake(self, watch: RequestWatch) -> None:
        self._woken.append(watch)
        self._event.set()
