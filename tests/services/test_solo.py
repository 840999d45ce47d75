"""A request that is to run alone gets its turn, whatever is handed over meanwhile, and its stage does not wait."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from l4queue import AsyncHandle
from l4queue.models import RequestState, StagePlan, WorkerLoad
from l4queue.policy.solo import SoloLimits
from l4queue.protocol.keys import SOLO_STAGE, private_queue
from tests.protocol.scene import Scene
from tests.services.pipeline import COST, Pipeline, open_pipeline, true, until

pytestmark = [pytest.mark.services]
QUICK = SoloLimits(patience_s=0.3, empty_s=0.6, step_s=30.0)
CROWDED = replace(COST, alpha_ms=4.0, beta_ms=4.0, pi_ms=0.0001)  # as in test_moving_work: moving pays
ENDLESS = {"max_tokens": 1900, "ignore_eos": True}


@pytest.fixture
async def pipeline(redis_url: str, namespace: str) -> AsyncIterator[Pipeline]:
    """A lease that a slow machine keeps."""
    async with open_pipeline(redis_url, namespace, lease_s=5.0) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.loop.solo._LIMITS", QUICK)


async def _suspect(pipeline: Pipeline, scene: Scene, *, num_tokens: int = 20) -> AsyncHandle:
    """A request that two workers died with; before any real one is there."""
    handle = await pipeline.client.enqueue("suspect", max_tokens=num_tokens, ignore_eos=True)
    await until(lambda: _is(handle, RequestState.QUEUED))
    for name in ("x1", "x2"):
        scene.register(name)
        scene.take(name)
        scene.lapse(name)
        scene.reap()
    assert scene.waiting(SOLO_STAGE) == [handle.id]
    return handle


async def _is(handle: AsyncHandle, state: RequestState) -> bool:
    return (await handle.status()).state is state


@asynccontextmanager
async def _handed_over(
    scene: Scene, worker_id: str, *, num_tokens: int = 60, every_s: float = 0.1
) -> AsyncIterator[list[str]]:
    """A stream of requests for this worker alone, whether it is open or not; their ids."""
    sent: list[str] = []

    async def send() -> None:
        for number in itertools.count():
            name = f"moved{number}"
            body = json.dumps({"params": {"max_tokens": num_tokens, "ignore_eos": True}})
            scene.submit(name, max_live_tokens=10**9, max_live_bytes=10**9, body=body)
            scene.route(name, stage=private_queue(worker_id), max_tokens=num_tokens)
            sent.append(name)
            await asyncio.sleep(every_s)

    sending = asyncio.create_task(send())
    try:
        yield sent
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_hand_overs_do_not_keep_a_worker_from_running_empty(pipeline: Pipeline, scene: Scene) -> None:
    """They never stop; the only worker takes none for as long as it needs, and all of them afterwards."""
    suspect = await _suspect(pipeline, scene)
    await pipeline.publish(StagePlan(low_tokens=0, high_tokens=None, num_workers=1, worker_ids=("w0",)))
    async with _handed_over(scene, "w0") as sent:
        await until(lambda: true(len(sent) > 3))
        worker = pipeline.start("w0", speed=5.0)
        await until(lambda: true(len(worker.active()) > 2))
        result = await suspect.result(timeout=60)
        assert result.output_tokens == 20
        num_before = len(sent)
        await until(lambda: true(len(sent) > num_before))
    for name in sent:
        handle = await pipeline.client.get(name)
        assert (await handle.result(timeout=60)).output_tokens > 0
        assert (await handle.status()).crashes == 0
    assert not worker.placement.is_emptying


async def test_a_request_without_end_does_not_keep_a_worker_from_running_empty(
    pipeline: Pipeline, scene: Scene
) -> None:
    """It goes back after a while, without blame and with its tokens, and goes on when the suspect has ended."""
    suspect = await _suspect(pipeline, scene, num_tokens=5)
    await pipeline.publish(StagePlan(low_tokens=0, high_tokens=None, num_workers=1, worker_ids=("w0",)))
    async with _handed_over(scene, "w0"):
        worker = pipeline.start("w0", speed=5.0)
        endless = await pipeline.client.enqueue("endless", **ENDLESS)  # type: ignore[arg-type]
        await until(lambda: true(any(view.request_id == endless.id for view in worker.active())))
        assert (await suspect.result(timeout=60)).output_tokens == 5
        await until(lambda: _is(endless, RequestState.RUNNING))
    record = await endless.status()
    assert record.was_resumed
    assert record.crashes == 0
    assert record.output_tokens > 0
    await endless.cancel()


async def test_the_emptiest_of_two_runs_empty_while_requests_are_handed_over(
    pipeline: Pipeline, scene: Scene
) -> None:
    """Real movers: they leave it alone, and its stage is served by its sibling."""
    suspect = await _suspect(pipeline, scene)
    stages = ((0, 40, "w0"), (40, None, "w1"))
    await pipeline.publish(
        *(StagePlan(low_tokens=a, high_tokens=b, num_workers=1, worker_ids=(w,)) for a, b, w in stages)
    )
    told: list[WorkerLoad] = []
    async with _handed_over(scene, "w1"):
        for name in ("w0", "w1"):
            pipeline.start(name, speed=3.0, cost=CROWDED)
        crowd = [await pipeline.client.enqueue(f"{i:05d}", max_tokens=250, ignore_eos=True) for i in range(12)]
        while (await suspect.status()).state is not RequestState.DONE:
            told += (await pipeline.client.overview()).workers
            await asyncio.sleep(0.02)
    assert any(load.is_emptying for load in told)
    assert not [load for load in told if load.is_emptying and load.is_open]
    for handle in crowd:
        await handle.cancel()


async def test_the_stage_of_a_worker_that_runs_empty_is_served_by_others(
    pipeline: Pipeline, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it is the only one of its stage, and far from empty: what is queued there is stolen."""
    monkeypatch.setattr("workers.loop.solo._LIMITS", replace(QUICK, empty_s=1000.0))
    w0, w1 = (pipeline.start(name, speed=5.0) for name in ("w0", "w1"))
    await until(lambda: true(all(w.fleet_view.others() for w in (w0, w1))))
    await pipeline.publish(
        StagePlan(low_tokens=0, high_tokens=40, num_workers=1, worker_ids=("w0",)),
        StagePlan(low_tokens=40, high_tokens=None, num_workers=1, worker_ids=("w1",)),
    )
    await until(lambda: true(w0.placement.plan.version == w1.placement.plan.version == 1))
    pinned = {**ENDLESS, "presence_penalty": 0.5}
    busy = [await pipeline.client.enqueue("x" * n, **pinned) for n in (5, 5, 5, 5, 60)]  # type: ignore[arg-type]
    await until(lambda: true(len(w0.active()) + len(w1.active()) == 5))
    emptier, other = sorted((w0, w1), key=lambda w: len(w.active()))
    suspect = next(iter(other.sessions))
    scene.raw.hset(scene.keys.request(suspect.request_id), "crashes", 1)
    scene.release(suspect.request_id, other.lease.incarnation, suspect.grant.epoch, blame=True)
    assert scene.waiting(SOLO_STAGE) == [suspect.request_id]
    await until(lambda: true(emptier.placement.is_emptying))

    for number in range(4):
        name = f"other{number}"
        scene.submit(name, max_live_tokens=10**9, max_live_bytes=10**9, body='{"params":{"max_tokens":5}}')
        scene.route(name, stage=str(emptier.placement.stage), token_ids=[1] * 60, max_tokens=5)
        await (await pipeline.client.get(name)).result(timeout=300)
        assert scene.record(name).worker == other.context.worker_id

    assert scene.waiting(SOLO_STAGE) == [suspect.request_id]
    assert emptier.placement.is_emptying
    for handle in busy:
        if handle.id != suspect.request_id:
            await handle.cancel()
    await until(lambda: true(suspect.request_id in {view.request_id for view in emptier.active()}))
    for handle in busy:
        await handle.cancel()


async def test_a_long_prompt_does_not_wait_for_what_is_handed_over_after_it(
    pipeline: Pipeline, scene: Scene
) -> None:
    """Its prefill takes longer than what runs, so that goes first; what comes later does not."""
    slow = replace(COST, alpha_ms=4.0, beta_ms=0.0, pi_ms=40.0)
    worker = pipeline.start("w0", speed=0.05, cost=slow)
    async with _handed_over(scene, "w0", num_tokens=500, every_s=0.03):
        await until(lambda: true(worker.sessions.num_finished > 5 and len(worker.active()) > 4))
        long = await pipeline.client.enqueue("y" * 1900, max_tokens=2, ignore_eos=True)
        assert (await long.result(timeout=300)).output_tokens == 2
