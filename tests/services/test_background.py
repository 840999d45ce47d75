"""A batch beside interactive traffic: held back, given back where it stands in the way, and never stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from l4queue import AsyncHandle
from l4queue.models import TERMINAL
from tests.services.pipeline import COST, Pipeline, open_pipeline, true, until
from workers.loop.worker import Worker

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
BATCH = {"priority": 100, "ignore_eos": True}
QUIET_S = 1.0


@pytest.fixture
async def pipeline(redis_url: str, namespace: str) -> AsyncIterator[Pipeline]:
    """A short memory of interactive requests; 16 slots."""
    async with open_pipeline(redis_url, namespace, background_quiet_s=QUIET_S) as opened:
        yield opened


def _running(worker: Worker) -> tuple[int, int]:
    """(background, others)."""
    kinds = [session.grant.is_background for session in list(worker.sessions)]
    return sum(kinds), len(kinds) - sum(kinds)


async def _batch(pipeline: Pipeline, number: int, *, max_tokens: int) -> list[AsyncHandle]:
    return [await pipeline.client.enqueue(f"line {i}", max_tokens=max_tokens, **BATCH) for i in range(number)]  # type: ignore[arg-type]


async def test_a_batch_has_all_slots_while_nobody_else_comes(pipeline: Pipeline) -> None:
    """Overnight it uses the whole machine."""
    worker = pipeline.start("w0", speed=1.0)
    handles = await _batch(pipeline, 40, max_tokens=30)

    await until(lambda: true(_running(worker) == (16, 0)))
    results = [await handle.result(timeout=120) for handle in handles]

    assert all(len(result.token_ids) == 30 and not result.resumed for result in results)


async def test_beside_others_a_batch_is_held_back_and_opens_again_afterwards(pipeline: Pipeline) -> None:
    """Steps of 4 ms, each batch request adds 0.2: four of them are what the others bear. Others have the slots."""
    worker = pipeline.start("w0", speed=1.0, cost=replace(COST, beta_ms=0.2))
    talk = await pipeline.client.enqueue("hello", max_tokens=400, ignore_eos=True)
    await until(lambda: true(_running(worker) == (0, 1)))
    handles = await _batch(pipeline, 40, max_tokens=100)
    most, seen = 0, 0

    while (await talk.status()).state not in TERMINAL:
        background, others = _running(worker)
        most, seen = max(most, background if others else 0), seen + 1
        await asyncio.sleep(0.005)

    assert seen > 100
    assert most == 4
    await until(lambda: true(_running(worker)[0] >= 15))
    for handle in handles:
        assert len((await handle.result(timeout=120)).token_ids) == 100


async def test_who_comes_to_a_full_engine_gets_a_slot_and_the_batch_goes_on_later(pipeline: Pipeline) -> None:
    """Given back with its progress, without blame; what a client reads is that of one uncut run."""
    worker = pipeline.start("w0", speed=1.0)
    handles = await _batch(pipeline, 16, max_tokens=1500)
    await until(lambda: true(_running(worker) == (16, 0)))
    await until(lambda: true(all(s.output_ids for s in worker.sessions)))

    talk = await pipeline.client.enqueue("hello", max_tokens=20, ignore_eos=True)
    result = await talk.result(timeout=120)

    background, _ = _running(worker)
    assert 1 <= background <= 12, "a quarter of the slots is for newcomers"
    stay = {s.request_id for s in worker.sessions if s.grant.is_background}
    assert result.e2e_s < 2.0, "a batch request takes 6 s"
    results = [await handle.result(timeout=120) for handle in handles]
    assert all(len(r.token_ids) == 1500 for r in results)
    assert {r.finish_reason for r in results} == {"length"}
    assert {r.request_id for r in results if not r.resumed} == stay, "who stayed was left alone"
    stories = [[event.what for event in await handle.explain()] for handle in handles]
    assert all("crashed" not in story and story.count("released") <= 1 for story in stories)
    assert sum("released" in story for story in stories) == sum(r.resumed for r in results)


async def test_a_batch_is_never_stopped_altogether(pipeline: Pipeline) -> None:
    """Even where one of its requests alone is beyond the bound, one runs."""
    worker = pipeline.start("w0", speed=1.0, cost=replace(COST, beta_ms=2.0))
    talk = await pipeline.client.enqueue("hello", max_tokens=300, ignore_eos=True)
    await until(lambda: true(_running(worker) == (0, 1)))
    handles = await _batch(pipeline, 3, max_tokens=10)

    results = [await handle.result(timeout=120) for handle in handles]

    assert all(len(r.token_ids) == 10 for r in results)
    assert (await talk.status()).state not in TERMINAL, "they ran beside it"


async def test_a_lower_threshold_makes_more_classes_background(redis_url: str, namespace: str) -> None:
    """`L4_BACKGROUND_PRIORITY`: below it requests are ordinary."""
    async with open_pipeline(redis_url, namespace, background_priority=5) as pipeline:
        worker = pipeline.start("w0", speed=1.0)
        for priority in (4, 5):
            await pipeline.client.enqueue("hello", max_tokens=300, ignore_eos=True, priority=priority)

        await until(lambda: true(_running(worker) == (1, 1)))
