"""Client, dispatcher and workers together in one process, on a real redis-server, with the emulated engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from dispatcher.planner.rounds import replan_once
from l4queue import RequestState
from l4queue.errors import (
    IdempotencyConflict,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestExpired,
    RequestTooLong,
    ResultTimeout,
    UnknownRequest,
)
from l4queue.models import StagePlan
from tests.services.pipeline import COST, Pipeline, open_pipeline, true, until

pytestmark = pytest.mark.services


async def test_a_request_is_served_streamed_and_read_again(pipeline: Pipeline) -> None:
    """Chunks follow each other; reading on from any chunk gives the rest; the result is their sum."""
    pipeline.start("w0")
    handle = await pipeline.client.enqueue("hello", max_tokens=40, metadata={"n": 1})
    chunks = [chunk async for chunk in handle.stream(timeout=120)]
    result = await handle.result(timeout=120)

    assert tuple(t for chunk in chunks for t in chunk.token_ids) == result.token_ids
    assert (result.output_tokens, result.finish_reason, result.metadata) == (40, "length", {"n": 1})
    assert not result.resumed
    again = await pipeline.client.get(handle.id)
    rest = [c async for c in again.stream(after=chunks[0].offset, timeout=120)]
    assert rest == chunks[1:]


async def test_many_requests_end_in_any_order_once(pipeline: Pipeline) -> None:
    """500 through two workers: each handle once, counters back to zero."""
    pipeline.start("w0")
    pipeline.start("w1")
    seen: list[int] = []
    handles = await pipeline.client.enqueue_many(["x"] * 500, max_tokens=2, progress=seen.append)
    ended = [handle.id async for handle in pipeline.client.as_completed(handles, timeout=120)]

    assert sorted(ended) == sorted(handle.id for handle in handles)
    assert seen[-1] == 500
    counts = (await pipeline.client.overview()).counts
    assert (counts["live"], counts["live_tokens"], counts["done"]) == (0, 0, 500)


async def test_beside_a_prompt_of_many_steps_nothing_is_taken(pipeline: Pipeline) -> None:
    """What waits for it stays in the queue, where any other worker could take it."""
    prompts = ["x" * 400, "y" * 400, "z" * 400]
    handles = await pipeline.client.enqueue_many(prompts, max_tokens=2)
    await until(lambda: _waits(pipeline, 3))
    worker = pipeline.start("w0", speed=1.0, cost=replace(COST, pi_ms=0.5, max_batched_tokens=256))
    most = 0

    async def all_begun() -> bool:
        nonlocal most
        most = max(most, len(worker.sessions.prefills))
        return all([(await handle.status()).first_token_at_s is not None for handle in handles])

    await until(all_begun)
    assert most == 1


async def _waits(pipeline: Pipeline, number: int) -> bool:
    return sum(queue.num_requests for queue in (await pipeline.client.overview()).queues.values()) == number


async def test_cancel_ends_waiting_and_running_requests(pipeline: Pipeline) -> None:
    """A second cancel says that it was over already."""
    waiting = await pipeline.client.enqueue("nobody serves yet", max_tokens=5)
    assert await waiting.cancel()
    with pytest.raises(RequestCancelled):
        await waiting.result(timeout=120)
    worker = pipeline.start("w0", speed=1.0)
    running = await pipeline.client.enqueue("long", max_tokens=1500)
    await pipeline.running("w0")
    assert await running.cancel()
    assert not await running.cancel()
    with pytest.raises(RequestCancelled):
        await running.result(timeout=120)
    await until(lambda: true(not worker.active()))


async def test_a_deadline_ends_waiting_and_running_requests(pipeline: Pipeline) -> None:
    """Expired, not computed to the end."""
    with pytest.raises(RequestExpired):
        await (await pipeline.client.enqueue("waits", max_tokens=5, deadline_s=0.2)).result(timeout=120)
    pipeline.start("w0", speed=1.0)
    with pytest.raises(RequestExpired):
        await (await pipeline.client.enqueue("runs", max_tokens=1900, deadline_s=0.5)).result(timeout=120)


async def test_the_same_idempotency_key_is_the_same_request(pipeline: Pipeline) -> None:
    """Same body: same id. Another body: a conflict."""
    first = await pipeline.client.enqueue("once", max_tokens=3, idempotency_key="k1")
    again = await pipeline.client.enqueue("once", max_tokens=3, idempotency_key="k1")
    assert first.id == again.id
    with pytest.raises(IdempotencyConflict):
        await pipeline.client.enqueue("twice", max_tokens=3, idempotency_key="k1")


async def test_a_full_backlog_is_refused_with_a_time_to_come_back(redis_url: str, namespace: str) -> None:
    """Nothing of a refused request is kept; many requests wait for room if they may."""
    async with open_pipeline(redis_url, namespace, max_backlog_tokens=100) as pipeline:
        await pipeline.client.enqueue("a", max_tokens=90)
        with pytest.raises(QueueFull) as caught:
            await pipeline.client.enqueue("b", max_tokens=90)
        assert caught.value.retry_after_s > 0
        pipeline.start("w0")
        handles = await pipeline.client.enqueue_many(["c"] * 4, max_tokens=60)
        assert [(await h.result(timeout=120)).output_tokens for h in handles] == [60] * 4


@pytest.mark.parametrize("num_bytes", [1, 1900, 2047])
async def test_a_left_out_max_tokens_is_what_still_fits(pipeline: Pipeline, num_bytes: int) -> None:
    """A long prompt is served, and one that leaves no room says so. Admission counts a usual output for it."""
    handle = await pipeline.client.enqueue("x" * num_bytes)
    await until(lambda: _is_queued(handle))
    live = (await pipeline.client.overview()).counts["live_tokens"]
    assert live == num_bytes + min(256, 2048 - num_bytes)
    pipeline.start("w0")
    assert (await handle.result(timeout=300)).output_tokens == 2048 - num_bytes
    with pytest.raises(RequestTooLong) as caught:
        await (await pipeline.client.enqueue("x" * 2048)).result(timeout=300)
    assert caught.value.field == "prompt"


async def _is_queued(handle: Any) -> bool:
    return (await handle.status()).state is RequestState.QUEUED


async def test_limits_and_unknown_ids_are_typed_errors(pipeline: Pipeline) -> None:
    """One token over the limit, an unknown id, a wait that ends first, an offset inside a chunk."""
    with pytest.raises(RequestTooLong) as caught:
        await (await pipeline.client.enqueue("x" * 2000, max_tokens=49)).result(timeout=120)
    assert caught.value.field == "max_tokens"
    with pytest.raises(UnknownRequest):
        await pipeline.client.get("nothing")
    handle = await pipeline.client.enqueue("x" * 2000, max_tokens=48)
    with pytest.raises(ResultTimeout):
        await handle.result(timeout=0.05)
    with pytest.raises(InvalidRequest):
        await pipeline.client.enqueue("x", stop=["a"] * 99)


async def test_a_crashed_worker_s_requests_go_on_where_they_were(pipeline: Pipeline) -> None:
    """The stream read during it has no gap, repeat or change; the whole equals an undisturbed run."""
    pipeline.start("calm")
    undisturbed = (await (await pipeline.client.enqueue("same", max_tokens=300)).result(timeout=120)).token_ids
    await pipeline.stop("calm")
    pipeline.start("w0", speed=1.0)
    handle = await pipeline.client.enqueue("same", max_tokens=300)
    reading = asyncio.create_task(_collect(handle))
    await until(lambda: _has_output(handle))
    await pipeline.crash("w0")
    pipeline.start("w1")

    assert await reading == undisturbed
    record = await handle.status()
    assert (record.state, record.num_leases, record.worker) == (RequestState.DONE, 2, "w1")


async def test_a_stopping_worker_gives_back_without_blame(pipeline: Pipeline) -> None:
    """The other one goes on from the last token; nothing counts as a crash."""
    pipeline.start("w0", speed=1.0)
    handle = await pipeline.client.enqueue("same", max_tokens=300)
    await until(lambda: _has_output(handle))
    await pipeline.stop("w0")
    assert (await handle.status()).state is RequestState.QUEUED
    pipeline.start("w1")

    result = await handle.result(timeout=120)
    assert (result.output_tokens, result.resumed) == (300, True)
    assert (await handle.status()).crashes == 0


async def test_workers_follow_a_new_plan_and_queues_of_old_stages_are_served(pipeline: Pipeline) -> None:
    """Two stages, then one: what waited in the second is served without a restart."""
    await pipeline.publish(
        StagePlan(low_tokens=0, high_tokens=100, num_workers=1, worker_ids=("w0",)),
        StagePlan(low_tokens=100, high_tokens=None, num_workers=1, worker_ids=("w1",)),
    )
    short = await pipeline.client.enqueue("s", max_tokens=3)
    long = await pipeline.client.enqueue("l" * 500, max_tokens=3)
    await until(lambda: _in_stage(long, "1"))
    assert await _in_stage(short, "0")
    await pipeline.publish(StagePlan(low_tokens=0, high_tokens=None, num_workers=1, worker_ids=("w0",)))
    pipeline.start("w0")

    assert (await long.result(timeout=120)).output_tokens == 3
    assert (await short.result(timeout=120)).output_tokens == 3


async def test_the_planner_publishes_for_the_workers_there_are(pipeline: Pipeline) -> None:
    """No workers: it keeps. Two: version 1 with both. Two rounds at once publish once."""
    assert await replan_once(pipeline.settings) == "no workers"
    pipeline.start("w0")
    pipeline.start("w1")
    await until(lambda: _num_workers(pipeline, 2))
    await asyncio.gather(replan_once(pipeline.settings), replan_once(pipeline.settings))

    plan = (await pipeline.client.overview()).plan
    assert plan.version == 1
    assert sorted(i for stage in plan.stages for i in stage.worker_ids) == ["w0", "w1"]
    assert [p.version for p in await pipeline.client.plan_history()] == [1]


async def _collect(handle) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    chunks = [chunk async for chunk in handle.stream(timeout=120)]
    assert [c.offset for c in chunks] == sorted({c.offset for c in chunks})
    return tuple(t for chunk in chunks for t in chunk.token_ids)


async def _has_output(handle) -> bool:  # type: ignore[no-untyped-def]
    return bool((await handle.status()).output_tokens)


async def _in_stage(handle, stage: str) -> bool:  # type: ignore[no-untyped-def]
    return bool((await handle.status()).stage == stage)


async def _num_workers(pipeline: Pipeline, number: int) -> bool:
    return len((await pipeline.client.overview()).workers) == number
