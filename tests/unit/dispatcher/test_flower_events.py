"""Flower's own intake with ours in its place, on a real event loop: fair, bounded, and right in its counts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from tornado.ioloop import IOLoop

from dispatcher.monitoring.flower_events import LEFT_OUT, MAX_WAITING, TOTALS, FairEvents, install
from dispatcher.monitoring.queue_follower import ENDED, WAITING
from l4queue.config import load_settings
from workers.host import task_events as senders

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def loop() -> Iterator[IOLoop]:
    loop = IOLoop(make_current=False)
    yield loop
    loop.close()


@pytest.fixture
def events(loop: IOLoop, namespace: str) -> FairEvents:
    install(load_settings())
    return FairEvents(Celery(namespace, set_as_current=False), loop, max_tasks_in_memory=20_000)


def event(type_: str, uuid: str = "", *, worker: str = "w1@here", **fields: Any) -> dict[str, Any]:
    """As Celery's receiver hands it on."""
    about: dict[str, Any] = {"uuid": uuid, "name": "generate/model"} if uuid else {}
    now_s = time.time()
    common = {"hostname": worker, "pid": 1, "clock": 1, "timestamp": now_s, "local_received": now_s}
    return {"type": type_, **common, **about, **fields}


def totals(run: str, succeeded: int, *, worker: str = "w1@here") -> dict[str, Any]:
    """A worker's own count."""
    return event(TOTALS, worker=worker, run=run, totals={"task-succeeded": succeeded, "task-failed": 0})


def digest(loop: IOLoop) -> None:
    """Let the loop run until it has nothing to do."""

    def look() -> None:
        if loop.asyncio_loop._ready:  # type: ignore[attr-defined]  # what waits in it, beside this look
            loop.add_callback(look)
        else:
            loop.stop()

    loop.add_callback(look)
    loop.start()


def test_both_sides_name_the_totals_alike() -> None:
    """Workers and dispatcher do not import each other."""
    assert senders.TOTALS == TOTALS


def test_the_page_shows_what_workers_tell_and_not_how_many_events_came(loop: IOLoop, events: FairEvents) -> None:
    """Two events, seven successes; and no less after the worker has begun anew."""
    for number in range(2):
        events.on_event(event("task-succeeded", str(number)))
    events.on_event(totals("first", 7))
    events.on_event(event("task-succeeded", "late"))
    digest(loop)
    assert events.state.counter["w1@here"]["task-succeeded"] == 7

    events.on_event(totals("second", 3))
    events.on_event(totals("second", 4))
    digest(loop)
    assert events.state.counter["w1@here"]["task-succeeded"] == 7 + 4


def test_the_last_totals_do_not_bring_a_worker_back_that_has_ended(loop: IOLoop, events: FairEvents) -> None:
    """They come on another connection, after its farewell."""
    events.on_event(event("worker-heartbeat", freq=60))
    events.on_event(event("worker-offline"))
    events.on_event(totals("first", 7))
    digest(loop)

    assert not events.state.workers["w1@here"].alive
    assert events.state.counter["w1@here"]["task-succeeded"] == 7


def test_a_worker_that_tells_no_totals_is_counted_by_its_events(loop: IOLoop, events: FairEvents) -> None:
    """The planner, for one."""
    events.on_event(totals("first", 7))
    events.on_event(event("task-succeeded", "replan", worker="planner@here"))
    digest(loop)

    assert events.state.counter["planner@here"]["task-succeeded"] == 1


def test_behind_it_leaves_out_what_is_not_shown_yet_and_never_a_failure_or_an_end(
    loop: IOLoop, events: FairEvents
) -> None:
    """Requests that are shown to run are shown to end, whatever waits behind them."""
    events.on_event(event("task-started", "shown"))
    digest(loop)
    before = LEFT_OUT._value.get()

    events.on_event(event("task-succeeded", "shown"))
    events.on_event(event("task-failed", "bad", exception="no"))
    events.on_event(event("task-received", "first"))
    for number in range(2 * MAX_WAITING):
        events.on_event(event("task-succeeded", str(number)))
    digest(loop)

    tasks = events.state.tasks
    assert tasks["shown"].state == "SUCCESS"
    assert tasks["bad"].state == "FAILURE"
    assert "first" not in tasks
    assert len(tasks) == 2 + MAX_WAITING
    assert LEFT_OUT._value.get() - before == 1 + MAX_WAITING


def test_other_work_of_the_loop_comes_in_between(loop: IOLoop, events: FairEvents) -> None:
    """A page waits for one slice, and not for all that has arrived before it."""
    for number in range(MAX_WAITING):
        events.on_event(event("task-succeeded", str(number)))
    seen: list[int] = []
    loop.add_callback(lambda: seen.append(len(events.state.tasks)))
    digest(loop)

    assert seen[0] < len(events.state.tasks) == MAX_WAITING


def test_what_the_queue_tells_counts_where_no_worker_has_told_it(loop: IOLoop, events: FairEvents) -> None:
    """A waiting request is received; a late look changes nothing of one that runs or has ended."""
    about = {"name": "generate/model", "args": "3 → ≤4 tokens, stage 0", "received": 100.0}
    revoked = {**about, "type": ENDED, "as": "task-revoked", "expired": False}
    done = {**about, "type": ENDED, "as": "task-succeeded", "result": "4 tokens, 1.0 s"}
    for uuid in ("waits", "gone", "sampled"):
        events.on_event({"type": WAITING, "uuid": uuid, **about})
    events.on_event({**revoked, "uuid": "gone"})
    events.on_event({**done, "uuid": "sampled"})
    events.on_event({**done, "uuid": "never shown"})
    events.on_event(event("task-started", "runs"))
    events.on_event({"type": WAITING, "uuid": "runs", **about})
    events.on_event(event("task-succeeded", "told", result="by its worker"))
    events.on_event({**done, "uuid": "told"})
    digest(loop)

    tasks = events.state.tasks
    states = {uuid: task.state for uuid, task in tasks.items()}
    assert states == {
        "waits": "RECEIVED", "gone": "REVOKED", "sampled": "SUCCESS", "runs": "STARTED", "told": "SUCCESS"
    }  # fmt: skip
    assert tasks["waits"].received == 100.0
    assert tasks["waits"].worker is None
    assert tasks["runs"].worker.hostname == "w1@here"
    assert tasks["told"].result == "by its worker"
    assert set(events.state.workers) == set(events.state.counter) == {"w1@here"}
