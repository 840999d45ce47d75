"""Flower's event intake: bounded and fair, with request counts taken from the workers' own totals.

Unguarded, Flower puts every event on its event loop at once. While many arrive, its pages wait behind them, and
undigested events pile up without bound. It also counts events, of which workers leave some out at high rates.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

import flower.app
import flower.events
from prometheus_client import Counter as PrometheusCounter

from l4queue.compat import TOTALS

__all__ = ("LEFT_OUT", "MAX_WAITING", "TOTALS", "ExactState", "FairEvents", "install")

MAX_WAITING = 2_000
"""Events that wait to be digested; beyond it those of requests that are not shown yet are left out."""
_MOST_WAITING = 50_000  # were all of them failures
_SLICE_S = 0.02
"""Longest digestion at one go, s. Chosen: a page waits no longer than that for the event loop."""
LEFT_OUT = PrometheusCounter(
    "l4queue_flower_events_left_out_total", "Events that Flower did not digest because it was behind"
)
_SKIPPED = ("task-received", "task-started", "task-succeeded")


class ExactState(flower.events.EventsState):  # type: ignore[misc]  # flower has no types
    """For workers that tell totals, the workers page shows those, and not how many events came."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._told: dict[str, tuple[str, dict[str, int]]] = {}
        self._earlier: dict[str, Counter[str]] = {}

    def event(self, event: dict[str, Any]) -> None:
        """Take in one event. Totals are no sign of life: the last come after a worker has said that it ends."""
        worker = event["hostname"]
        if event["type"] == TOTALS:
            self._tell(worker, str(event["run"]), {str(k): int(v) for k, v in event["totals"].items()})
        else:
            super().event(event)
        if worker in self._told:
            earlier = self._earlier[worker]
            self.counter[worker].update(
                {name: earlier[name] + n - self.counter[worker][name] for name, n in self._told[worker][1].items()}
            )

    def _tell(self, worker: str, run: str, totals: dict[str, int]) -> None:
        before = self._told.get(worker)
        earlier = self._earlier.setdefault(worker, Counter())
        if before is not None and before[0] != run:
            earlier.update(before[1])
        self._told[worker] = (run, totals)


class FairEvents(flower.events.Events):  # type: ignore[misc]
    """Digests events in short slices, so that pages come in between. Failures and retries are never left out,
    nor is the end of a request whose beginning is shown."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_MOST_WAITING)
        self._is_scheduled = False

    def on_event(self, event: dict[str, Any]) -> None:
        """Called by the receiving thread for each event."""
        self._waiting.append(event)
        if not self._is_scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._is_scheduled = True
        self.io_loop.add_callback(self._digest)

    def _digest(self) -> None:
        """On the event loop, for one slice. The flag is cleared before the last look: nothing stays unseen."""
        until_s = time.monotonic() + _SLICE_S
        while self._waiting and time.monotonic() < until_s:
            event = self._waiting.popleft()
            if len(self._waiting) < MAX_WAITING or self._must_be_shown(event):
                self.state.event(event)
            else:
                LEFT_OUT.inc()
        if not self._waiting:
            self._is_scheduled = False
        if self._waiting:
            self._schedule()

    def _must_be_shown(self, event: dict[str, Any]) -> bool:
        kind = event["type"]
        return kind not in _SKIPPED or (kind == "task-succeeded" and event["uuid"] in self.state.tasks)


def install() -> None:
    """Make Flower use these, in this process."""
    flower.events.EventsState = ExactState
    flower.app.Events = FairEvents
