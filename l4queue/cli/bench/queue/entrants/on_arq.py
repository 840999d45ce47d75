"""arq: a worker with 64 jobs at once that polls every 5 ms; results polled too, as arq has no other way."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker
from pacing import CONCURRENCY, RESULT, Sender, gathered, redis_url, run, serve

_POLL_S = 0.005  # 0.5 by default, which would be the latency
_RUSH_POLL_S = 0.02  # of the next result that is missing


async def noop(_: Any, prompt: Any) -> str:
    return RESULT


class ArqSender(Sender):
    packages = ("arq", "redis", "hiredis", "uvloop")
    uses_uvloop = True

    async def open(self) -> None:
        self.pool = await create_pool(RedisSettings.from_dsn(redis_url()))

    async def close(self) -> None:
        await self.pool.aclose()

    async def rush(self, prompts: Sequence[Any]) -> float:
        jobs: list[Any] = []

        async def enqueue(prompt: Any) -> str:
            jobs.append(await self.pool.enqueue_job("noop", prompt))
            return RESULT

        began_s = time.perf_counter()
        await gathered(enqueue, prompts, at_once=CONCURRENCY)
        sent_s = time.perf_counter() - began_s
        await gathered(lambda job: job.result(poll_delay=_RUSH_POLL_S), jobs)
        return sent_s

    async def one(self, prompt: Any, *, what: str) -> float:
        job = await self.pool.enqueue_job("noop", prompt)
        assert await job.result(poll_delay=_POLL_S) == RESULT
        return time.perf_counter()


async def work() -> None:
    settings = RedisSettings.from_dsn(redis_url())
    await Worker(
        [noop], redis_settings=settings, max_jobs=CONCURRENCY, poll_delay=_POLL_S, handle_signals=False
    ).async_run()


if __name__ == "__main__":
    if sys.argv[1] == "client":
        serve(ArqSender())
    else:
        run(work(), uses_uvloop=True)
