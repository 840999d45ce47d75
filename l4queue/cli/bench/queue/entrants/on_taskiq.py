"""taskiq with taskiq-redis streams: one worker process with 64 tasks at once; results polled, as it has it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pacing import CONCURRENCY, RESULT, Sender, gathered, redis_url, serve
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

_POLL_S = 0.005  # 0.2 by default, which would be the latency
_RUSH_POLL_S = 0.02  # of the next result that is missing

broker = RedisStreamBroker(redis_url()).with_result_backend(RedisAsyncResultBackend(redis_url()))


@broker.task(task_name="noop")
async def noop(prompt: Any) -> str:
    return RESULT


class TaskiqSender(Sender):
    packages = ("taskiq", "taskiq-redis", "redis", "hiredis", "uvloop")
    uses_uvloop = True

    async def open(self) -> None:
        await broker.startup()

    async def close(self) -> None:
        await broker.shutdown()

    async def rush(self, prompts: Sequence[Any]) -> float:
        tasks: list[Any] = []

        async def enqueue(prompt: Any) -> str:
            tasks.append(await noop.kiq(prompt))
            return RESULT

        async def result(task: Any) -> Any:
            return (await task.wait_result(check_interval=_RUSH_POLL_S)).return_value

        began_s = time.perf_counter()
        await gathered(enqueue, prompts, at_once=CONCURRENCY)
        sent_s = time.perf_counter() - began_s
        await gathered(result, tasks)
        return sent_s

    async def one(self, prompt: Any, *, what: str) -> float:
        task = await noop.kiq(prompt)
        assert (await task.wait_result(check_interval=_POLL_S)).return_value == RESULT
        return time.perf_counter()


if __name__ == "__main__":
    serve(TaskiqSender())
