"""Prefix affinity live: follow-ups go to the worker that holds their beginning; nothing is lost when it dies."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from dispatcher.planner.rounds import replan_once
from l4queue import AsyncClient, AsyncHandle, Client, Settings
from l4queue.models import StagePlan
from l4queue.policy.prefix_blocks import BLOCK_TOKENS
from l4queue.protocol.keys import Keys
from tests.services.pipeline import Pipeline, open_pipeline, true
from tests.services.pipeline import until as until_async
from tests.services.processes import Processes, until
from workers.engine.emulated.engine import EmulatedEngine
from workers.engine.emulated.scheduler import next_tokens

pytestmark = pytest.mark.services
CACHING = partial(EmulatedEngine, has_prefix_cache=True)
PROMPT = "All that is said before is known already. " * 20
NUM_BLOCKS = len(PROMPT) // BLOCK_TOKENS
HOLDS = "holds most of its prefix"


@pytest_asyncio.fixture
async def pipeline(redis_url: str, namespace: str) -> AsyncIterator[Pipeline]:
    """Workers that choose."""
    async with open_pipeline(redis_url, namespace, prefix_affinity="true") as opened:
        yield opened


async def _why(handle: AsyncHandle) -> tuple[str, str | None]:
    """Who took it, and why."""
    (taken,) = [event for event in await handle.explain() if event.what == "taken"]
    return taken.facts["worker"], taken.facts.get("reason")


async def _num_blocks(pipeline: Pipeline) -> int:
    """Blocks that are told of all workers."""
    keys = Keys(pipeline.settings.namespace)
    loads = (await pipeline.client.overview()).workers
    reply = [await _size(pipeline, keys.blocks(load.incarnation)) for load in loads]
    return sum(reply)


async def _size(pipeline: Pipeline, key: str) -> int:
    from l4queue.protocol.calls import Call

    size: int = await pipeline.executor.run(Call(None, (), ("SCARD", key), int))
    return size


async def _num_cached(pipeline: Pipeline) -> int:
    """Cached tokens that workers count."""
    return sum(load.num_cached_tokens for load in (await pipeline.client.overview()).workers)


async def _are_told(pipeline: Pipeline, least: int) -> None:
    await until_async(lambda: _at_least(_num_blocks(pipeline), least))


async def _at_least(value: object, least: int) -> bool:
    return await value >= least  # type: ignore[misc, no-any-return]


async def _knowing_each_other(pipeline: Pipeline) -> None:
    number = len(pipeline.workers)
    await until_async(
        lambda: true(all(len(w.fleet_view.others()) == number - 1 for w, _ in pipeline.workers.values()))
    )


async def test_follow_ups_go_to_the_worker_that_holds_them(pipeline: Pipeline) -> None:
    """Where all is idle the holder is the cheapest; its engine finds what was believed, and more."""
    for name in ("w0", "w1", "w2"):
        pipeline.start(name, make_engine=CACHING)
    await _knowing_each_other(pipeline)
    first = await pipeline.client.enqueue(PROMPT, max_tokens=8)
    begun = await first.result(timeout=120)
    await _are_told(pipeline, NUM_BLOCKS)
    assert await _why(first) == (begun.worker, "nobody holds its prefix")
    for turn in range(6):
        handle = await pipeline.client.enqueue(PROMPT + f"And now for {turn}.", max_tokens=4)
        result = await handle.result(timeout=120)
        assert (result.worker, await _why(handle)) == (begun.worker, (begun.worker, HOLDS))
        assert result.cached_tokens is not None
        assert NUM_BLOCKS * BLOCK_TOKENS <= result.cached_tokens < result.prompt_tokens
    await until_async(lambda: _at_least(_num_cached(pipeline), 6 * NUM_BLOCKS * BLOCK_TOKENS))


async def test_many_requests_are_computed_once_and_right(pipeline: Pipeline) -> None:
    """By three workers that choose at once, each by its own view; with background ones among them."""
    for name in ("w0", "w1", "w2"):
        pipeline.start(name, speed=0.05, make_engine=CACHING)
    prompts = [f"{n % 7} {PROMPT * (n % 3)} {n}" for n in range(120)]
    requests = [{"prompt": p, "max_tokens": 5, "priority": 100 * (n % 4 == 0)} for n, p in enumerate(prompts)]
    handles = await pipeline.client.enqueue_many(requests)  # type: ignore[arg-type]
    results = [await handle.result(timeout=240) for handle in handles]
    for prompt, result in zip(prompts, results, strict=True):
        assert list(result.token_ids) == next_tokens(list(prompt.encode()), 5)
    assert not any(result.resumed for result in results)
    counts = (await pipeline.client.overview()).counts
    assert (counts["live"], counts["live_tokens"], counts["done"]) == (0, 0, 120)


async def test_an_engine_without_a_prefix_cache_takes_in_order(pipeline: Pipeline) -> None:
    """As ever: no blocks, no choice."""
    pipeline.start("w0")
    handle = await pipeline.client.enqueue(PROMPT, max_tokens=4)
    result = await handle.result(timeout=120)
    assert result.cached_tokens is None
    assert await _why(handle) == ("w0", None)
    assert await _num_blocks(pipeline) == 0


async def test_without_the_setting_nothing_is_told(redis_url: str, namespace: str) -> None:
    async with open_pipeline(redis_url, namespace) as pipeline:
        pipeline.start("w0", make_engine=CACHING)
        for _ in range(2):
            handle = await pipeline.client.enqueue(PROMPT, max_tokens=4)
            result = await handle.result(timeout=120)
        assert (result.cached_tokens or 0) > 0
        assert await _why(handle) == ("w0", None)
        assert await _num_blocks(pipeline) == 0


async def test_the_planner_leaves_stages_out(pipeline: Pipeline) -> None:
    """Those of a plan from before go with its next round."""
    pipeline.start("w0", make_engine=CACHING)
    pipeline.start("w1", make_engine=CACHING)
    await pipeline.publish(
        StagePlan(low_tokens=0, high_tokens=100, num_workers=1, worker_ids=("w0",)),
        StagePlan(low_tokens=100, high_tokens=None, num_workers=1, worker_ids=("w1",)),
    )
    told = await replan_once(pipeline.settings)
    assert told.endswith("prefix affinity: stages are left out")
    assert len((await pipeline.client.overview()).plan.stages) == 1
    assert await replan_once(pipeline.settings) == "prefix affinity: stages are left out"


async def test_what_waits_for_a_worker_that_dies_is_taken_by_others(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """Real processes, the holder killed while follow-ups wait for it and run there: all end, and right."""
    values = {
        "redis_url": redis_url,
        "namespace": namespace,
        "engine": "emulated",
        "model": "tiny",
        "max_model_len": 4096,
        "max_running": 2,
        "lease_s": 1.0,
        "prefix_affinity": "true",
        "emulated_prefix_cache": "true",
    }
    processes = Processes(tmp_path, **values)
    settings = Settings(redis_url=redis_url, namespace=namespace)  # type: ignore[arg-type]
    ids = [n % 4000 + 100 for n in range(2000)]
    try:
        processes.start("dispatcher", "-m", "dispatcher")
        processes.worker("w0")
        processes.worker("w1")
        with Client(settings=settings) as client:
            until(lambda: len(client.overview().workers) == 2, "two workers")
            first = client.enqueue(token_ids=ids, max_tokens=4, ignore_eos=True).result(timeout=120)
            until(lambda: _is_told(client, settings, first.worker), "blocks of the holder")
        async with AsyncClient(settings=settings) as client:
            requests = [
                {"token_ids": [*ids, number], "max_tokens": 200, "ignore_eos": True} for number in range(100, 112)
            ]
            handles = await client.enqueue_many(requests)  # type: ignore[arg-type]
            await until_async(lambda: _begun(handles[0]))
            processes.send(first.worker, signal.SIGKILL)
            results = [await handle.result(timeout=240) for handle in handles]
            for number, result in zip(range(100, 112), results, strict=True):
                assert list(result.token_ids) == next_tokens([*ids, number], 200)
            assert {result.worker for result in results} >= {"w0", "w1"} - {first.worker}
            assert (await client.overview()).counts["live"] == 0
    finally:
        processes.close()


async def _begun(handle: AsyncHandle) -> bool:
    return (await handle.status()).output_tokens > 0


def _is_told(client: Client, settings: Settings, worker: str) -> bool:
    import redis

    load = next(load for load in client.overview().workers if load.worker_id == worker)
    raw = redis.Redis.from_url(settings.redis_url.reveal())
    return bool(raw.exists(Keys(settings.namespace).blocks(load.incarnation)))
