"""Flower's event intake: bounded and fair, with request counts taken from the workers' own totals.

It also takes in what the queue itself tells of requests that no worker has.

Unguarded, Flower puts every event on its event loop at once. While many arrive, its pages wait behind them, and
undigested events pile up without bound. It also counts events, of which workers leave some out at high rates.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from functools import partial
from typing import Any

import flower.app
import flower.events
from celery import states
from celery.events.state import State
from prometheus_client import Counter as PrometheusCounter

from dispatcher.monitoring.queue_follower import ENDED, WAITING, QueueFollower
from l4queue.compat import TOTALS
from l4queue.config import Settings

__all__ = ("LEFT_OUT", "MAX_WAITING", "TOTALS", "ExactState", "FairEvents", "FollowingEvents", "install")

MAX_WAITING = 2_000
"""Events that wait to be digested; beyond it those of requests that are not shown yet are left out."""
_MOST_WAITING = 50_000  # were all of them failures
_SLICE_S = 0.02
"""Longest digestion at one go, s. Chosen: a page waits no longer than that for the event loop."""
LEFT_OUT = PrometheusCounter(
    "l4queue_flower_events_left_out_total", "Events that Flower did not digest because it was behind"
)
_SKIPPED = ("task-received", "task-started", "task-succeeded", WAITING)
_QUEUE = "queue"  # in place of a worker's name while an event of the queue is taken in


class ExactState(flower.events.EventsState):  # type: ignore[misc]  # flower has no types
    """For workers that tell totals, the workers page shows those, and not how many events came."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._told: dict[str, tuple[str, dict[str, int]]] = {}
        self._earlier: dict[str, Counter[str]] = {}
        self._clock = 0

    def event(self, event: dict[str, Any]) -> None:
        """Take in one event. Totals are no sign of life: the last come after a worker has said that it ends."""
        if event["type"] in (WAITING, ENDED):
            self._hear_queue(dict(event))
            return
        self._clock = max(self._clock, event.get("clock") or 0)
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

    def _hear_queue(self, event: dict[str, Any]) -> None:
        """A request that waits and is not known yet is received; an end counts where no worker has told one.

        Of what has ended well, only what is shown already is taken in: workers may leave out the others.
        """
        task = self.tasks.get(event["uuid"])
        if event.pop("type") == WAITING:
            if task is not None:
                return
            kind = "task-received"
        else:
            kind = event.pop("as")
            if task is None and kind == "task-succeeded":
                return
            if task is not None and task.state in states.READY_STATES:
                return
        worker, now_s = None if task is None else task.worker, time.time()
        evicted = self._eviction_candidate(event["uuid"])
        known = {"hostname": _QUEUE, "clock": self._clock, "timestamp": now_s, "local_received": now_s}
        State.event(self, {"type": kind, **known, **event})  # not Flower's own, which counts it for a worker
        self.workers.pop(_QUEUE, None)
        self.tasks[event["uuid"]].worker = worker
        self._index_task(self.tasks[event["uuid"]], evicted)

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


class FollowingEvents(FairEvents):
    """Events of workers, and of the queue of these settings."""

    def __init__(self, *given: Any, settings: Settings, **named: Any) -> None:
        super().__init__(*given, **named)
        self._follower = QueueFollower(settings, self.on_event)

    def start(self) -> None:
        """Begin to take in both."""
        super().start()
        self._follower.start()


def install(settings: Settings) -> None:
    """Make Flower use these, in this process."""
    flower.events.EventsState = ExactState
    flower.app.Events = partial(FollowingEvents, settings=settings)
