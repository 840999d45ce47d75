"""Celery on Redis: one worker process (solo) that prefetches 64; results over the backend's subscription."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from celery import Celery
from pacing import CONCURRENCY, RESULT, Sender, redis_url, serve

_WAIT_S = 60.0  # for a result
_WORKER = ("worker", "-P", "solo", "--without-gossip", "--without-mingle", "--without-heartbeat")

app = Celery("bench", broker=redis_url(), backend=redis_url())
app.conf.update(worker_prefetch_multiplier=CONCURRENCY, worker_concurrency=1)


@app.task
def noop(prompt: Any) -> str:
    return RESULT


class CelerySender(Sender):
    packages = ("celery", "kombu", "redis", "hiredis")
    can_pace = False

    async def open(self) -> None:
        app.connection().ensure_connection()

    async def close(self) -> None:
        app.close()

    async def rush(self, prompts: Sequence[Any]) -> float:
        began_s = time.perf_counter()
        results = [noop.delay(prompt) for prompt in prompts]
        sent_s = time.perf_counter() - began_s
        for result in results:
            assert result.get(timeout=_WAIT_S) == RESULT
        return sent_s

    async def one(self, prompt: Any, *, what: str) -> float:
        assert noop.delay(prompt).get(timeout=_WAIT_S) == RESULT
        return time.perf_counter()


if __name__ == "__main__":
    if sys.argv[1] == "client":
        serve(CelerySender())
    else:
        app.worker_main([*_WORKER, "--loglevel", "WARNING"])
