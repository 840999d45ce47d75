"""saq: a worker with 64 jobs at once; results as `Queue.map` and `Queue.apply` read them, polled every few ms."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

from pacing import CONCURRENCY, RESULT, Sender, redis_url, run, serve
from saq import Queue, Worker

_POLL_S = 0.002  # of `apply`, 0.5 by default: a latency is that of the queue, and not of its poll
_RUSH_POLL_S = 0.05  # of a page of results
_PAGE = 500  # jobs of one MGET; `map` asks for all that remain


async def noop(_: Any, *, prompt: Any) -> str:
    return RESULT


class SaqSender(Sender):
    packages = ("saq", "redis", "hiredis", "uvloop")
    uses_uvloop = True

    async def open(self) -> None:
        self.queue = Queue.from_url(redis_url())
        await self.queue.connect()

    async def close(self) -> None:
        await self.queue.disconnect()

    async def rush(self, prompts: Sequence[Any]) -> float:
        began_s = time.perf_counter()
        jobs = await asyncio.gather(*(self.queue.enqueue("noop", prompt=prompt) for prompt in prompts))
        sent_s = time.perf_counter() - began_s
        keys = [job.key for job in jobs if job is not None]
        assert len(keys) == len(prompts)
        for begin in range(0, len(keys), _PAGE):
            left = keys[begin : begin + _PAGE]
            while left:
                found = await self.queue.jobs(left)
                assert all(job.result == RESULT for job in found if job.completed)
                left = [job.key for job in found if not job.completed]
                if left:
                    await asyncio.sleep(_RUSH_POLL_S)
        return sent_s

    async def one(self, prompt: Any, *, what: str) -> float:
        assert await self.queue.apply("noop", prompt=prompt, poll_interval=_POLL_S) == RESULT
        return time.perf_counter()


async def work() -> None:
    queue = Queue.from_url(redis_url())
    await queue.connect()
    await Worker(queue, functions=[noop], concurrency=CONCURRENCY).start()


if __name__ == "__main__":
    if sys.argv[1] == "client":
        serve(SaqSender())
    else:
        run(work(), uses_uvloop=True)
