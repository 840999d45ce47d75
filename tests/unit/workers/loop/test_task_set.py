"""What a loop starts beside itself does not fail unheard."""

from __future__ import annotations

import asyncio
import logging

import pytest

from workers.loop.task_set import TaskSet


async def test_the_first_that_fails_is_raised_to_whoever_watches() -> None:
    chores, may_go_on = TaskSet(), asyncio.Event()

    async def fail(why: str) -> None:
        await may_go_on.wait()
        raise RuntimeError(why)

    chores.start(fail("first"))
    chores.start(fail("second"))
    assert len(chores) == 2
    may_go_on.set()
    with pytest.raises(RuntimeError, match="first"):
        await chores.failure()
    await chores.finish()
    assert len(chores) == 0


async def test_at_the_end_those_in_progress_are_awaited_and_their_failures_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chores, done = TaskSet(), list[str]()

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        done.append(name)
        if name == "bad":
            raise RuntimeError("it broke")

    for name in ("good", "bad"):
        chores.start(work(name))
    with caplog.at_level(logging.ERROR):
        await chores.finish()
    assert sorted(done) == ["bad", "good"]
    assert "it broke" in caplog.text
