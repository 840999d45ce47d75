"""streaq: a worker with 64 tasks at once; enqueue_many, and a subscription for each result."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from pacing import CONCURRENCY, RESULT, Sender, gathered, redis_url, serve
from streaq import Worker

_SUBSCRIPTIONS = 128  # at once; each ends a tenth of a second after its result, so that fewer would be the limit
_CONNECTIONS = 512  # a subscription and a read for each; 64 by default

worker = Worker(
    redis_url=redis_url(),
    redis_kwargs={"max_connections": _CONNECTIONS},
    concurrency=CONCURRENCY,
    anyio_kwargs={"use_uvloop": True},
)


@worker.task
async def noop(prompt: Any) -> str:
    return RESULT


class StreaqSender(Sender):
    packages = ("streaq", "coredis", "uvloop")
    uses_uvloop = True

    async def open(self) -> None:
        await worker.__aenter__()

    async def close(self) -> None:
        await worker.__aexit__(None, None, None)

    async def rush(self, prompts: Sequence[Any]) -> float:
        began_s = time.perf_counter()
        tasks = [noop.enqueue(prompt) for prompt in prompts]
        await worker.enqueue_many(tasks)
        sent_s = time.perf_counter() - began_s
        await gathered(_result, tasks, at_once=_SUBSCRIPTIONS)
        return sent_s

    async def one(self, prompt: Any, *, what: str) -> float:
        assert await _result(await noop.enqueue(prompt)) == RESULT
        return time.perf_counter()


async def _result(task: Any) -> Any:
    return (await task.result()).result


if __name__ == "__main__":
    if sys.argv[1] == "client":
        serve(StreaqSender())
    else:
        worker.run_sync()
