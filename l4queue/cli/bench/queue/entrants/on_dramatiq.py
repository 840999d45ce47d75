"""dramatiq: one worker process with 8 threads, its default; results by a blocking read of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from pacing import RESULT, Sender, redis_url, serve

_WAIT_MS = 60_000  # for a result

broker = RedisBroker(url=redis_url())
broker.add_middleware(Results(backend=RedisBackend(url=redis_url())))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def noop(prompt: Any) -> str:
    return RESULT


class DramatiqSender(Sender):
    packages = ("dramatiq", "redis", "hiredis")
    can_pace = False

    async def open(self) -> None:
        broker.client.ping()

    async def close(self) -> None:
        broker.close()

    async def rush(self, prompts: Sequence[Any]) -> float:
        began_s = time.perf_counter()
        messages = [noop.send(prompt) for prompt in prompts]
        sent_s = time.perf_counter() - began_s
        for message in messages:
            assert message.get_result(block=True, timeout=_WAIT_MS) == RESULT
        return sent_s

    async def one(self, prompt: Any, *, what: str) -> float:
        assert noop.send(prompt).get_result(block=True, timeout=_WAIT_MS) == RESULT
        return time.perf_counter()


if __name__ == "__main__":
    serve(DramatiqSender())
