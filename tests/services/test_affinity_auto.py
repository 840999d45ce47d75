"""Prefix affinity chosen by the planner: what workers tell for it, how they begin and end, a whole deployment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from dispatcher.planner.rounds import refine_once, replan_once
from l4queue import AsyncClient, Settings
from l4queue.models import StagePlan
from l4queue.plan_json import plan_from_json
from l4queue.policy.prefix_blocks import block_keys
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from l4queue.sim.records import FEWEST_TOLD
from tests.services.pipeline import Pipeline, open_pipeline, true
from tests.services.pipeline import until as until_async
from tests.services.processes import Processes
from tests.services.test_planner_tasks import CELERY
from workers.engine.emulated.engine import EmulatedEngine
from workers.engine.emulated.scheduler import next_tokens

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
CACHING = partial(EmulatedEngine, has_prefix_cache=True)
PROMPT = "All that is said before is known already. " * 20
ONE = StagePlan(low_tokens=0, high_tokens=None, num_workers=2, worker_ids=("w0", "w1"))


async def _start(pipeline: Pipeline, *names: str) -> None:
    """Workers that know how many they are."""
    for name in names:
        pipeline.start(name, make_engine=CACHING)
    workers = [worker for worker, _ in pipeline.workers.values()]
    await until_async(lambda: true(all(w.fleet_view.num_workers == len(names) for w in workers)))


async def _ask(pipeline: Pipeline, number: int) -> tuple[dict[str, str | None], bytes]:
    """A prompt that begins like the others: the reasons of its events, and what its end told of it."""
    handle = await pipeline.client.enqueue(f"{PROMPT}{number}", max_tokens=4)
    await handle.result(timeout=120)
    reasons = {event.what: event.facts.get("reason") for event in await handle.explain()}
    (told,) = await pipeline.executor.run(Reads(Keys(pipeline.settings.namespace)).finished(count=1))
    assert told.request_id == handle.id
    return reasons, told.blocks


async def _has_told(pipeline: Pipeline) -> bool:
    """Whether dispatchers know of any block."""
    keys, names = Keys(pipeline.settings.namespace), [w.lease.incarnation for w, _ in pipeline.workers.values()]
    found = [await pipeline.executor.run(Call(None, (), ("EXISTS", keys.blocks(name)), int)) for name in names]
    return any(found)


@pytest.mark.parametrize(
    ("setting", "names", "is_told"),
    [("auto", ("w0", "w1"), True), ("auto", ("w0",), False), ("false", ("w0", "w1"), False)],
)
async def test_workers_tell_content_where_it_repeats_and_one_may_choose(
    redis_url: str, namespace: str, setting: str, names: Sequence[str], is_told: bool
) -> None:
    """The keys of the prompt's blocks, once something was found: no dispatcher looked into these prompts."""
    async with open_pipeline(redis_url, namespace, prefix_affinity=setting) as pipeline:
        await _start(pipeline, *names)
        assert (await _ask(pipeline, 0))[1] == b""  # nothing was found before
        for number in range(1, 6):
            reasons, told = await _ask(pipeline, number)
        assert (reasons["routed"], reasons["taken"]) == (None, None)
        assert told == (b"".join(block_keys(list(f"{PROMPT}5".encode()))) if is_told else b"")
        assert not await _has_told(pipeline)


async def test_workers_choose_while_the_plan_says_so(redis_url: str, namespace: str) -> None:
    """From the next request on, and no longer than that; then nothing is kept of it."""
    async with open_pipeline(redis_url, namespace) as pipeline:
        await _start(pipeline, "w0", "w1")
        sessions = [worker.sessions for worker, _ in pipeline.workers.values()]
        assert (await _ask(pipeline, 0))[0]["taken"] is None
        await pipeline.publish(ONE, prefix_affinity=True)
        await until_async(lambda: true(all(one.blocks is not None for one in sessions)))
        assert (await _ask(pipeline, 1))[0]["taken"] == "nobody holds its prefix"
        await until_async(lambda: _has_told(pipeline))
        reasons, blocks = await _ask(pipeline, 2)
        assert (reasons["taken"], reasons["routed"]) == ("holds most of its prefix", "prefix affinity")
        assert blocks == b"".join(block_keys(list(f"{PROMPT}2".encode())))
        await pipeline.publish(ONE)
        await until_async(lambda: true(all(one.blocks is None for one in sessions)))
        for number in range(3):
            reasons, _ = await _ask(pipeline, number)
            assert (reasons["routed"], reasons["taken"]) == (None, None)


async def test_switched_off_the_plan_says_so_too(redis_url: str, namespace: str) -> None:
    """The planner of a deployment with `false` takes it out of a plan from before."""
    async with open_pipeline(redis_url, namespace, prefix_affinity="false") as pipeline:
        await _start(pipeline, "w0", "w1")
        await pipeline.publish(ONE, prefix_affinity=True)
        assert (await _ask(pipeline, 0))[0]["taken"] is None
        assert (await replan_once(pipeline.settings)).endswith("prefix affinity is switched off")
        plan = (await pipeline.client.overview()).plan
        assert (plan.prefix_affinity, plan.stages) == (False, (ONE,))


@pytest.mark.parametrize(("setting", "is_guessed"), [("auto", True), ("false", False)])
async def test_affinity_is_guessed_between_two_rounds(
    redis_url: str, namespace: str, setting: str, is_guessed: bool
) -> None:
    """As soon as enough was told of how much comes again, with no replay and before the planner's next round."""
    async with open_pipeline(redis_url, namespace, prefix_affinity=setting) as pipeline:
        await _start(pipeline, "w0", "w1")
        await _ask(pipeline, 0)
        await replan_once(pipeline.settings)
        for number in range(1, 5):
            await _ask(pipeline, number)
        await refine_once(pipeline.settings)
        assert not (await pipeline.client.overview()).plan.prefix_affinity  # these were too few
        for number in range(5, 8 + FEWEST_TOLD):
            await _ask(pipeline, number)
        reason = await refine_once(pipeline.settings)
        plan = (await pipeline.client.overview()).plan
        assert plan.prefix_affinity == is_guessed
        assert ("of the prompt tokens came again" in reason) == is_guessed
        assert [stage.worker_ids for stage in plan.stages] == [("w0", "w1")]


async def test_conversations_bring_affinity_about(redis_url: str, namespace: str, tmp_path: Path) -> None:
    """Real processes that know nothing at first: the planner guesses it, and a replay of what came agrees."""
    values = {
        "redis_url": redis_url,
        "namespace": namespace,
        "engine": "emulated",
        "model": "tiny",
        "max_model_len": 16_384,
        "emulated_prefix_cache": "true",
        "emulated_speed": 4.0,
        "replan_interval_s": 1.0,
        "plan_min_life_s": 0.0,
    }
    processes = Processes(tmp_path, **values)
    settings = Settings(redis_url=redis_url, namespace=namespace)  # type: ignore[arg-type]
    executor, reads = AsyncExecutor(redis_url), Reads(Keys(namespace))
    try:
        processes.start("dispatcher", "-m", "dispatcher")
        for name in ("w0", "w1", "w2"):
            processes.worker(name)
        processes.start("planner", *CELERY, "worker", "-l", "INFO", "-n", "planner@%h")
        processes.start("beat", *CELERY, "beat", "--pidfile=")
        async with AsyncClient(settings=settings) as client:
            await until_async(lambda: _are_three(client))
            stop = asyncio.Event()
            talking = [asyncio.create_task(_talk(client, number, stop)) for number in range(12)]
            await until_async(lambda: _goes_by_prefix(client), timeout_s=400)
            plan = (await client.overview()).plan
            await until_async(lambda: _is_replayed(executor, reads), timeout_s=400)
            kept = (await client.overview()).plan
            stop.set()
            assert all(await asyncio.gather(*talking))  # every answer was right
            assert plan.reason.startswith("prefix affinity: ")
            assert kept.prefix_affinity
            decisions = [json.loads(line) for line in await _decisions(executor, reads)]
            assert any(one["publish"] and one["reason"] == plan.reason for one in decisions)
            history = await executor.run(reads.plan_history(count=100))
            assert any(plan_from_json(body).prefix_affinity for _, _, body in history)
            await until_async(lambda: _is_chosen(client), timeout_s=120)
            assert (await client.overview()).counts["live"] == 0
    finally:
        await executor.close()
        processes.close()


async def _are_three(client: AsyncClient) -> bool:
    return len((await client.overview()).workers) == 3


async def _goes_by_prefix(client: AsyncClient) -> bool:
    return (await client.overview()).plan.prefix_affinity


async def _is_replayed(executor: AsyncExecutor, reads: Reads) -> bool:
    """Whether the simulator has told what affinity is worth."""
    decisions = [json.loads(line) for line in await _decisions(executor, reads)]
    found = [one for decision in decisions for one in decision["candidates"] if one.get("prefix_affinity")]
    return any(one["scored"] is not None for one in found)


async def _decisions(executor: AsyncExecutor, reads: Reads) -> list[str]:
    return [line for _, line in await executor.run(reads.decisions(count=500))]


async def _talk(client: AsyncClient, number: int, stop: asyncio.Event) -> bool:
    """One conversation after the other, each turn upon the answer to the last one; whether all were right."""
    is_right, round_number = True, 0
    while not stop.is_set():
        ids, round_number = [100 + number, 100 + round_number, *range(200, 3200)], round_number + 1
        for turn in range(8):
            if stop.is_set():
                break
            ids += [300 + turn] * 200
            handle = await client.enqueue(token_ids=ids, max_tokens=4, ignore_eos=True)
            result = await handle.result(timeout=240)
            is_right &= list(result.token_ids) == next_tokens(ids, 4)
            ids += result.token_ids
    return is_right


async def _is_chosen(client: AsyncClient) -> bool:
    """Whether `explain` tells that a follow-up went where its beginning is."""
    handle = await client.enqueue(token_ids=[7, *range(200, 3200)], max_tokens=4, ignore_eos=True)
    await handle.result(timeout=120)
    return any(event.text.endswith("holds most of its prefix") for event in await handle.explain())
