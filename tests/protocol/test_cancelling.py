"""A task that is cancelled amid commands ends, at whatever moment the cancel comes."""

from __future__ import annotations

import asyncio

import pytest

from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.reads import Reads
from tests.protocol.scene import Scene

MOMENTS = 60  # turns of the loop; the commands below take about half as many


@pytest.mark.parametrize("kind", ["one", "many", "wait"])
async def test_no_cancel_is_lost(scene: Scene, kind: str) -> None:
    """`asyncio.wait_for` before Python 3.12, which redis-py sends with, drops one that comes with its value."""
    executor = AsyncExecutor(scene.executor.url)
    reads = Reads(scene.keys)

    async def work() -> None:
        while True:
            match kind:
                case "one":
                    await executor.run(reads.record("x"))
                case "many":
                    await executor.run_many([reads.record("x"), reads.record("y")])
                case _:
                    await executor.wait({"nothing": "0-0"}, block_s=0.001)

    for moment in range(MOMENTS):
        task = asyncio.create_task(work())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        found, _ = await asyncio.wait([task], timeout=300)
        assert found, f"it goes on after a cancel at turn {moment}"
        assert task.cancelled()
    await executor.close()
