"""Limits of the key that owns a batch: it waits, goes on, gives back, and charges no line twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai.types import Batch
from redis import Redis

from l4queue.protocol.keys import Keys
from tests.services.batch_gateway import BatchGateway, open_gateway
from tests.services.batches import submitted
from tests.services.charges import watched_charges
from tests.services.pipeline import Pipeline, true, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
ANN, BOB = "the-key-of-ann-16", "the-key-of-bob-16"
CHARGED, USED = 21, 20  # tokens of a line: ten of prompt (and one, as it is estimated), ten of output


def lines_of_ids(number: int) -> bytes:
    """Requests whose tokens are known before."""
    body = {"prompt": list(range(10)), "max_tokens": 10, "ignore_eos": True}
    lines = [
        json.dumps({"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": body})
        for i in range(number)
    ]
    return "\n".join(lines).encode()


@dataclass(kw_only=True)
class Owner:
    """Ann with her limits: her client, her counts in Redis, and the file with her key."""

    gateway: BatchGateway
    pipeline: Pipeline
    redis: Any
    file: Path

    def allow(self, limits: str) -> None:
        """Write the file of keys anew."""
        (self.file.parent / "new").write_text(f"ann {ANN} {limits}\n")
        (self.file.parent / "new").replace(self.file)

    async def begin(self, number: int, **more: Any) -> Batch:
        """A batch of hers."""
        return await self.gateway.begin(lines_of_ids(number), endpoint="/v1/completions", **more)

    async def waits(self, limit: str) -> None:
        """Until her batch is told to wait for this limit, and none of its lines is in the queue."""

        async def is_limited() -> bool:
            told = {"limit": limit}
            is_told = self.gateway.registry.get_sample_value("l4queue_http_batches_limited", told) == 1
            return is_told and (await self.pipeline.client.overview()).counts.get("live", 0) == 0

        await until(is_limited)

    @property
    def charged(self) -> dict[bytes, bytes]:
        """What is counted of requests that have not ended."""
        return dict(self.redis.hgetall(Keys(self.pipeline.settings.namespace).charged("ann")))

    @property
    def limit(self) -> str:
        """The name of her buckets."""
        return Keys(self.pipeline.settings.namespace).limit("ann")

    def fill(self, tokens: int) -> None:
        """As if requests over HTTP had taken this number."""
        now_s, us = self.redis.time()
        self.redis.hset(self.limit, mapping={"tokens": tokens, "at": now_s * 1000 + us // 1000})


@asynccontextmanager
async def owner(pipeline: Pipeline, folder: Path, limits: str) -> AsyncIterator[Owner]:
    """Ann at a gateway with these limits."""
    file, redis = folder / "keys", Redis.from_url(pipeline.settings.redis_url)
    file.write_text(f"ann {ANN} {limits}\n")
    async with open_gateway(pipeline, str(folder / "store"), key=ANN, keys_file=str(file)) as gateway:
        yield Owner(gateway=gateway, pipeline=pipeline, redis=redis, file=file)
    redis.close()


async def test_a_batch_is_no_faster_than_its_bucket(pipeline: Pipeline, tmp_path: Path) -> None:
    """Half of it at once, then what leaks. All lines are answered in the end, and nothing stays charged."""
    pipeline.start("w0")
    async with owner(pipeline, tmp_path, "tokens_per_minute=600") as ann:
        began_s, _ = ann.redis.time()
        granted_tokens = 300.0

        async def has_kept_to_it() -> bool:
            num_submitted = await submitted(pipeline)
            leaked_tokens = (ann.redis.time()[0] + 1 - began_s) * 600 / 60
            return num_submitted * USED <= granted_tokens + leaked_tokens

        batch = await ann.begin(45)
        await ann.waits("tokens")
        assert await submitted(pipeline) >= 300 // CHARGED
        while (await ann.gateway.client.batches.retrieve(batch.id)).status != "completed":
            assert await has_kept_to_it()
            granted_tokens += 100
            ann.redis.hincrby(ann.limit, "at", -10_000)  # as if ten seconds more had passed
            before = await submitted(pipeline)

            async def goes_on(before: int = before) -> bool:
                assert await has_kept_to_it()
                status = (await ann.gateway.client.batches.retrieve(batch.id)).status
                return await submitted(pipeline) > before or status == "completed"

            await until(goes_on)
        assert await has_kept_to_it()
        ended = await ann.gateway.ended(batch)
        answers = await ann.gateway.answers(ended.output_file_id)
        assert sorted(a["custom_id"] for a in answers) == sorted(f"c{i}" for i in range(45))
        assert ann.charged == {b"*": b"0"}


async def test_a_cancelled_batch_gives_everything_back(pipeline: Pipeline, tmp_path: Path) -> None:
    """Nothing of it was computed: no worker serves."""
    async with owner(pipeline, tmp_path, "tokens_per_minute=600 requests_per_minute=1000") as ann:
        batch = await ann.begin(40)
        await until(lambda: true(len(ann.charged) > 10))
        await ann.gateway.client.batches.cancel(batch.id)
        ended = await ann.gateway.ended(batch)
        errors = await ann.gateway.answers(ended.error_file_id)
        assert (ended.status, len(errors)) == ("cancelled", 40)
        assert ann.charged == {b"*": b"0"}
        tokens, at_ms = ann.redis.hmget(ann.limit, "tokens", "at")
        assert float(tokens) - (ann.redis.time()[0] + 1 - int(at_ms) / 1000) * 600 / 60 <= 0


async def test_a_batch_that_waits_expires_with_its_window(pipeline: Pipeline, tmp_path: Path) -> None:
    """A limit fails no line; the end of the window does."""
    pipeline.start("w0")
    async with owner(pipeline, tmp_path, "tokens_per_minute=600") as ann:
        ann.fill(10**7)
        batch = await ann.begin(5, completion_window="3s")
        ended = await ann.gateway.ended(batch)
        errors = await ann.gateway.answers(ended.error_file_id)
        assert (ended.status, ended.output_file_id) == ("expired", None)
        assert [error["error"]["code"] for error in errors] == ["batch_expired"] * 5
        assert await submitted(pipeline) == 0
        assert ann.charged == {}


@pytest.mark.parametrize("limits", ["requests_per_minute=8", "backlog_tokens=100"])
async def test_each_limit_holds_for_lines(pipeline: Pipeline, tmp_path: Path, limits: str) -> None:
    """Half of it: four requests, or two lines that have not ended. A limit that is raised is heeded at once."""
    name = limits.partition("_")[0]
    num_lines = {"requests": 4, "backlog": 2}[name]
    async with owner(pipeline, tmp_path, limits) as ann:
        began_s, _ = ann.redis.time()
        batch = await ann.begin(20)

        async def is_limited() -> bool:
            return bool(ann.gateway.registry.get_sample_value("l4queue_http_batches_limited", {"limit": name}))

        await until(is_limited)
        num_submitted = await submitted(pipeline)
        num_leaked = 0 if name == "backlog" else (ann.redis.time()[0] + 1 - began_s) * 8 / 60
        assert num_lines <= num_submitted <= num_lines + num_leaked
        pipeline.start("w0")
        ann.allow("requests_per_minute=100000")
        ended = await ann.gateway.ended(batch)
        assert len(await ann.gateway.answers(ended.output_file_id)) == 20
        assert set(ann.charged.values()) <= {b"0"}


async def test_the_batch_of_a_key_that_is_gone_goes_on(pipeline: Pipeline, tmp_path: Path) -> None:
    """Without limits: to bound it, the key has to stay, and may expire."""
    pipeline.start("w0")
    async with owner(pipeline, tmp_path, "tokens_per_minute=600") as ann:
        ann.fill(10**7)
        batch = await ann.begin(30)
        await ann.waits("tokens")
        ann.file.write_text(f"bob {BOB}\n")

        async def has_all() -> bool:
            return await submitted(pipeline) == 30

        await until(has_all)
        ann.allow("tokens_per_minute=600")  # so that she may look
        ended = await ann.gateway.ended(batch)
        assert len(await ann.gateway.answers(ended.output_file_id)) == 30


async def test_batches_that_wait_hold_up_no_others(pipeline: Pipeline, tmp_path: Path) -> None:
    """Of ann one runs at a time, and bob's are served beside it. One that is cancelled ends before its turn."""
    pipeline.start("w0")
    async with owner(pipeline, tmp_path, f"tokens_per_minute=600\nbob {BOB}") as ann:
        ann.fill(10**7)
        waiting = [await ann.begin(5) for _ in range(6)]
        await ann.waits("tokens")
        bob = BatchGateway(client=ann.gateway.client_of(BOB), http=ann.gateway.http, registry=ann.gateway.registry)
        theirs = [await bob.begin(lines_of_ids(5), endpoint="/v1/completions") for _ in range(6)]
        assert {(await bob.ended(batch)).status for batch in theirs} == {"completed"}
        states = [(await ann.gateway.client.batches.retrieve(batch.id)).status for batch in waiting]
        assert states == ["in_progress", *["validating"] * 5]
        await ann.gateway.client.batches.cancel(waiting[3].id)
        assert (await ann.gateway.ended(waiting[3])).status == "cancelled"
        ann.redis.delete(ann.limit)
        assert {(await ann.gateway.ended(one)).status for one in waiting[:3]} == {"completed"}


async def test_without_limits_nothing_is_counted(pipeline: Pipeline, tmp_path: Path) -> None:
    """A key that has none costs no call."""
    pipeline.start("w0")
    async with owner(pipeline, tmp_path, "") as ann:
        ended = await ann.gateway.ended(await ann.begin(20))
        assert (ended.status, ann.redis.exists(ann.limit), ann.charged) == ("completed", 0, {})


async def test_the_next_gateway_charges_no_line_again(pipeline: Pipeline, tmp_path: Path) -> None:
    """The first one stops while lines wait to be computed; the second one settles what ended meanwhile."""
    redis = Redis.from_url(pipeline.settings.redis_url)
    name = Keys(pipeline.settings.namespace).charged("ann")
    with watched_charges(redis, name) as seen:
        async with owner(pipeline, tmp_path, "tokens_per_minute=6000") as first:
            batch = await first.begin(100)
            await until(lambda: true(len(first.charged) > 100))
        pipeline.start("w0")

        async def is_idle() -> bool:
            return (await pipeline.client.overview()).counts["live"] == 0

        await until(is_idle)
        async with owner(pipeline, tmp_path, "tokens_per_minute=6000") as second:
            ended = await second.gateway.ended(batch)
            answers = await second.gateway.answers(ended.output_file_id)
            assert second.charged == {b"*": b"0"}
    assert ended.status == "completed"
    assert len({answer["custom_id"] for answer in answers}) == len(answers) == 100
    assert Counter(seen.charged.values()) == Counter(seen.settled.values()) == {1: 100}
    assert seen.charged == seen.settled
    redis.close()
