"""Work for a request is marked exactly while the loop is inside it; what it raised or cost is known by request."""

from __future__ import annotations

import asyncio
import time

import pytest

from workers.engine.base import EngineDied
from workers.engine.loop_work import LoopWork, lease_of


def test_an_id_in_the_engine_names_request_and_epoch() -> None:
    """Ids of requests may have colons, too."""
    assert lease_of("a:b:7") == ("a:b", 7)


async def test_a_coroutine_is_marked_while_it_runs_and_not_while_it_waits() -> None:
    work, go_on, seen = LoopWork(), asyncio.Event(), []

    async def admit() -> str:
        seen.append(work.current)
        await go_on.wait()
        with work.on("inner:1"):
            seen.append(work.current)
        seen.append(work.current)
        return "admitted"

    async def run() -> str:
        return await work.steps("outer:1", admit())

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    assert (seen, work.current) == (["outer:1"], None)
    go_on.set()
    assert await task == "admitted"
    assert seen == ["outer:1", "inner:1", "outer:1"]
    assert work.current is None


async def test_a_cancellation_reaches_the_coroutine() -> None:
    """It may clean up, and even go on."""
    work, ends = LoopWork(), []

    async def wait_for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append(work.current)

    async def run() -> None:
        await work.steps("a:1", wait_for_ever())

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends == ["a:1"]
    assert work.current is None


async def test_the_culprit_of_a_failure_is_who_raised_it() -> None:
    """By the error itself: not one that was handled, nor the death of an engine, for which nobody is known."""
    work = LoopWork()

    async def fail(error: Exception) -> None:
        raise error

    errors = [ValueError("first"), ValueError("second"), EngineDied("dead")]
    for number, error in enumerate(errors[:2]):
        with pytest.raises(ValueError):
            await work.steps(f"r{number}:1", fail(error))
    assert work.culprit(errors[1]) == "r1:1"
    assert work.culprit(errors[0]) is None, "that was handled"
    assert work.culprit(None) is None
    with pytest.raises(EngineDied):
        await work.steps("r2:1", fail(errors[2]))
    assert work.culprit(errors[2]) is None


def test_only_computing_counts_as_busy() -> None:
    """Who waits, or is stopped, does not use the processor."""
    work = LoopWork()
    with work.on("sleeps:1"):
        time.sleep(0.3)
    with work.on("computes:1"):
        began_s = time.thread_time()
        while time.thread_time() - began_s < 0.2:
            pass
    between_s = time.monotonic()
    assert work.busy_for(0.15) == ["computes:1"]
    assert work.busy_for(100.0) == []
    with work.on("computes:2"):
        began_s = time.thread_time()
        while time.thread_time() - began_s < 0.2:
            pass
    work.forget(between_s)
    assert work.busy_for(0.15) == ["computes:2"]
