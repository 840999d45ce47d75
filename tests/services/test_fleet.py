"""Fleets: a request costs the same however many workers wait for one, and a lost wake-up strands nothing."""

from __future__ import annotations

import pytest
import redis

from l4queue.cli.bench.queue.counts import commands_of
from l4queue.models import RequestState
from l4queue.protocol.keys import Keys, private_queue
from l4queue.protocol.scripts import all_scripts
from tests.services.pipeline import open_pipeline, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
NUM_REQUESTS = 8


async def _all_ready(raw: redis.Redis, keys: Keys, num_workers: int) -> None:
    """Wait until this number of workers waits for an arrival in the only stage."""

    async def are_ready() -> bool:
        return raw.zcard(keys.ready("0")) == num_workers

    await until(are_ready)


@pytest.mark.parametrize("num_workers", [2, 9])
async def test_a_request_wakes_one_worker_of_however_many(
    redis_url: str, namespace: str, num_workers: int
) -> None:
    """By one wake-up for each, which brings it and is gone with its end."""
    keys, names = Keys(namespace), [f"w{number}" for number in range(num_workers)]
    async with open_pipeline(redis_url, namespace, lease_s=30.0) as pipeline:
        with redis.Redis.from_url(redis_url) as raw:
            for name in names:
                pipeline.start(name)
            for _ in range(NUM_REQUESTS):
                await _all_ready(raw, keys, num_workers)
                handle = await pipeline.client.enqueue("hello", max_tokens=2, ignore_eos=True)
                await handle.result(timeout=120)
            streams = [keys.wake(private_queue(name)) for name in names]
            infos = [raw.xinfo_stream(stream) for stream in streams if raw.exists(stream)]
            assert sum(info["entries-added"] for info in infos) == NUM_REQUESTS
            assert sum(info["length"] for info in infos) == 0
            assert raw.xlen(keys.wake("0")) == 0


async def test_a_request_by_itself_is_neither_taken_nor_looked_up(redis_url: str, namespace: str) -> None:
    """It comes with the wake-up of a worker that runs nothing; its output tells the client all of the record."""
    keys, scripts = Keys(namespace), {one.sha: one.name for one in all_scripts()}
    async with open_pipeline(redis_url, namespace, lease_s=30.0) as pipeline:
        with redis.Redis.from_url(redis_url) as raw:
            for name in ("w0", "w1"):
                pipeline.start(name)

            async def work() -> None:
                for _ in range(NUM_REQUESTS):
                    handle = await pipeline.client.enqueue("hello", max_tokens=1, ignore_eos=True)
                    await handle.result(timeout=120)

            await _all_ready(raw, keys, 2)
            sent, _, _ = await commands_of(pipeline.settings.redis_url, work(), scripts=scripts)
    once = ("script submit", "script route", "script settle", "xrange")
    assert {name: sent[name] for name in once} == dict.fromkeys(once, NUM_REQUESTS)
    assert sent["script take"] < NUM_REQUESTS  # some look now and then of their own accord


async def test_a_request_that_nobody_was_woken_for_is_found(redis_url: str, namespace: str) -> None:
    """The wake-up was lost: the worker that was woken has died, or Redis has lost it."""
    keys = Keys(namespace)
    async with open_pipeline(redis_url, namespace, lease_s=30.0) as pipeline:
        with redis.Redis.from_url(redis_url) as raw:
            for name in ("w0", "w1"):
                pipeline.start(name)
            await _all_ready(raw, keys, 2)
            raw.delete(keys.ready("0"))  # they believe that an arrival will wake them
            handle = await pipeline.client.enqueue("hello", max_tokens=2, ignore_eos=True)
            await handle.result(timeout=120)
            assert (await handle.status()).state is RequestState.DONE
            assert [raw.xlen(keys.wake(private_queue(name))) for name in ("w0", "w1")] == [0, 0]
