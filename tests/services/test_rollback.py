"""A worker that takes a request twice under one epoch, because Redis has forgotten the first time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import redis

from l4queue.models import RequestState
from l4queue.protocol.keys import Keys, private_queue
from tests.chaos.wishes import expected
from tests.services.pipeline import COST, open_pipeline, until

pytestmark = [pytest.mark.services]
PROMPT = "taken twice"


async def test_a_lease_that_was_undone_and_had_again_is_given_back(redis_url: str, namespace: str) -> None:
    """Output of the first run is not taken for that of the second: both end, a third makes the answer."""
    slow = replace(COST, alpha_ms=1000.0)  # it is taken again before its first token
    keys = Keys(namespace)
    async with open_pipeline(redis_url, namespace, lease_s=5.0) as pipeline:
        pipeline.start("w", speed=1.0, cost=slow)
        handle = await pipeline.client.enqueue(PROMPT, max_tokens=2, ignore_eos=True)
        await pipeline.running("w")
        record = await handle.status()
        assert (record.num_leases, record.output_tokens) == (1, 0)
        with redis.Redis.from_url(redis_url) as raw, raw.pipeline() as undo:  # as it was before the take
            key = keys.request(handle.id)
            score = float(raw.hget(key, "score") or 0)
            incarnation = raw.hget(key, "owner").decode()
            undo.hdel(key, "owner", "worker", "started_ms")
            undo.hset(key, mapping={"state": "queued", "epoch": 0})
            undo.srem(keys.held(incarnation), handle.id)
            undo.hdel(keys.worker(incarnation), "nonce", "grants")
            undo.zadd(keys.queue("0"), {handle.id: score})
            undo.hincrby(keys.backlog, "0", len(PROMPT))
            undo.xadd(keys.wake(private_queue("w")), {"s": "0"})
            undo.execute()

        async def is_third() -> bool:
            return (await handle.status()).num_leases == 2

        await until(is_third)
        assert (await handle.result(timeout=120)).token_ids == expected(PROMPT, 2)
        record = await handle.status()
    assert (record.state, record.crashes, record.num_leases) == (RequestState.DONE, 0, 2)
