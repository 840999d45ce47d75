"""Work moves between workers: hand-over, running and waiting requests stolen, newcomers, own queues."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import pytest

from l4queue import AsyncHandle
from l4queue.cost.step import StepCost
from l4queue.errors import RequestCancelled, RequestExpired
from l4queue.models import Plan, Routing, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Call, Calls, Verdict
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from tests.services.pipeline import COST, MAX_LEN, Pipeline, open_pipeline, true, until
from workers.engine.base import Cut
from workers.engine.emulated.engine import EmulatedEngine

pytestmark = pytest.mark.services
# every request in a batch costs the others a lot, a prefill next to nothing: moving pays at once
CROWDED = replace(COST, alpha_ms=1.0, beta_ms=2.0, pi_ms=0.0001)


def _stages(*ranges: tuple[int, int | None, tuple[str, ...]]) -> tuple[StagePlan, ...]:
    return tuple(
        StagePlan(low_tokens=low, high_tokens=high, num_workers=len(ids), worker_ids=ids)
        for low, high, ids in ranges
    )


async def _equals(value: Awaitable[object], expected: object) -> bool:
    return await value == expected


async def _uncut(prompt: str, max_tokens: int, cost: StepCost = COST) -> tuple[int, ...]:
    """What one engine generates without any move."""
    from l4queue.models import SamplingParams
    from workers.engine.base import EngineRequest

    engine = EmulatedEngine(cost, speed=0.0, max_model_len=MAX_LEN)
    await engine.start()
    await engine.add(
        EngineRequest(
            request_id="x",
            token_ids=list(prompt.encode()),
            max_tokens=max_tokens,
            min_tokens=0,
            params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )
    )
    ids: list[int] = []
    while len(ids) < max_tokens:
        ids += [token for output in await engine.outputs() for token in output.token_ids]
    await engine.stop()
    return tuple(ids)


async def _ledger(pipeline: Pipeline, request_id: str) -> list[dict[str, Any]]:
    lines = await pipeline.executor.run(Reads(Keys(pipeline.settings.namespace)).ledger(request_id))
    return [json.loads(line) for line in lines]


async def test_a_growing_request_travels_through_all_stages(redis_url: str, namespace: str) -> None:
    """Three stages: cut twice at token boundaries; the stream a client reads is that of one uncut run."""
    async with open_pipeline(redis_url, namespace, steal_from="none", max_running=32) as pipeline:
        await _travel(pipeline)


async def _travel(pipeline: Pipeline) -> None:
    for name in ("w0", "w1", "w2"):
        pipeline.start(name, speed=1.0, cost=CROWDED)
    await pipeline.publish(*_stages((0, 40, ("w0",)), (40, 120, ("w1",)), (120, None, ("w2",))))
    await until(lambda: true(all(w.placement.plan.version for w, _ in pipeline.workers.values())))
    await until(lambda: true(all(len(w.fleet_view.others()) == 2 for w, _ in pipeline.workers.values())))
    # crowds that stay: a penalty pins a request to its worker
    stays = {"max_tokens": 600, "ignore_eos": True, "presence_penalty": 0.5}
    crowd = [await pipeline.client.enqueue("x" * length, **stays) for length in (5,) * 16 + (60,) * 6]
    await pipeline.running("w0", 16)
    await pipeline.running("w1", 6)
    handle = await pipeline.client.enqueue("hello", max_tokens=300, ignore_eos=True)

    streamed = [token async for chunk in handle.stream(timeout=120) for token in chunk.token_ids]
    result = await handle.result(timeout=120)

    assert tuple(streamed) == result.token_ids == await _uncut("hello", 300)
    assert result.resumed
    lines = await _ledger(pipeline, handle.id)
    moves = [(line["what"], line.get("to") or line.get("worker", "")) for line in lines]
    assert [m for m in moves if m[0] == "hand-over"] == [("hand-over", "@w1"), ("hand-over", "@w2")], moves
    assert all(line["benefit_ms"] > line["cost_ms"] for line in lines if line["what"] == "hand-over")
    for other in crowd:
        assert await other.cancel()
    told = [event.what for event in await handle.explain()]
    assert told[:4] == ["accepted", "routed", "taken", "first token"]
    assert told[4:] == ["hand-over", "taken", "resumed", "hand-over", "taken", "resumed", "done"]
    counts = (await pipeline.client.overview()).counts
    assert counts["handovers"] >= 2
    assert counts["live"] == 0


async def _outgrow(pipeline: Pipeline, num_tokens: int) -> AsyncHandle:
    """A request that will outgrow the crowded stage of w0 while w1 idles."""
    await pipeline.publish(*_stages((0, 40, ("w0",)), (40, None, ("w1",))))
    await until(lambda: true(all(w.placement.plan.version for w, _ in pipeline.workers.values())))
    await until(lambda: true(all(w.fleet_view.others() for w, _ in pipeline.workers.values())))
    stays = {"max_tokens": 600, "ignore_eos": True, "presence_penalty": 0.5}
    for _ in range(12):
        await pipeline.client.enqueue("x" * 5, **stays)
    await pipeline.running("w0", 12)
    return await pipeline.client.enqueue("hello", max_tokens=num_tokens, ignore_eos=True)


async def test_the_kv_cache_moves_with_the_request_where_engines_can_move_it(
    redis_url: str, namespace: str
) -> None:
    """The ticket travels through Redis, nothing is prefilled again, the decision weighed the transfer."""
    rate = 1e9
    async with open_pipeline(
        redis_url, namespace, steal_from="none", max_running=32, emulated_kv_bytes_per_s=rate
    ) as pipeline:
        target = [pipeline.start(name, speed=1.0, cost=CROWDED) for name in ("w0", "w1")][1]
        handle = await _outgrow(pipeline, 300)
        assert (await handle.result(timeout=120)).token_ids == await _uncut("hello", 300)
        (moved,) = [line for line in await _ledger(pipeline, handle.id) if line["what"] == "hand-over"]
        assert moved["kv"]
        length_tokens = len("hello") + moved["offset"]
        stats = target.context.engine.stats()
        assert (stats.num_kv_loads, stats.num_kv_misses) == (1, 0)
        assert target.stats()["kv_loads"] == 1
        # a token or two may be computed between decision and cut
        price = target.profile.move_price
        costs = [price.delay_ms(length_tokens - late, CROWDED) for late in range(4)]
        assert price.bandwidth_bytes_per_s == rate
        assert any(moved["cost_ms"] == pytest.approx(cost, abs=0.001) for cost in costs), (moved, costs)


@pytest.mark.parametrize("escape", [True, False])
async def test_what_runs_leaves_before_a_long_prefill(redis_url: str, namespace: str, escape: bool) -> None:
    """A prompt that takes a second comes to where a request decodes: it goes to the short stage and stays."""
    slow = replace(COST, pi_ms=1.0, max_batched_tokens=256)
    async with open_pipeline(
        redis_url, namespace, steal_from="none", emulated_kv_bytes_per_s=1e9, escape=escape
    ) as pipeline:
        for name in ("w0", "w1"):
            pipeline.start(name, speed=1.0, cost=slow)
        await pipeline.publish(*_stages((0, 100, ("w0",)), (100, None, ("w1",))))
        await until(lambda: true(all(w.placement.plan.version for w, _ in pipeline.workers.values())))
        await until(lambda: true(all(w.fleet_view.others() for w, _ in pipeline.workers.values())))
        prompt = "x" * 150
        decoding = await pipeline.client.enqueue(prompt, max_tokens=400, ignore_eos=True)
        async for _ in decoding.stream(timeout=120):
            break

        long = await pipeline.client.enqueue("y" * 1200, max_tokens=2, ignore_eos=True)

        assert (await decoding.result(timeout=120)).token_ids == await _uncut(prompt, 400)
        assert len((await long.result(timeout=120)).token_ids) == 2
        moves = [line for line in await _ledger(pipeline, decoding.id) if "kv" in line]
        if not escape:
            assert not moves
            return
        assert [(line["what"], line["to"], line["kv"]) for line in moves] == [("escape", "@w0", True)]
        assert moves[0]["benefit_ms"] > 500.0 > moves[0]["cost_ms"]
        assert "away from a prefill" in "".join(event.text for event in await decoding.explain())


async def test_prefill_that_begins_or_ends_is_told_at_once(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the lease to be renewed, which takes more than a test here."""
    monkeypatch.setattr("workers.loop.lease.NEWS_INTERVAL_S", 1000.0)
    slow = replace(COST, pi_ms=1.0, max_batched_tokens=256)
    async with open_pipeline(redis_url, namespace, lease_s=3000.0) as pipeline:
        pipeline.start("w0", speed=1.0, cost=slow)
        handle = await pipeline.client.enqueue("y" * 1200, max_tokens=400, ignore_eos=True)

        async def pending() -> list[int]:
            return [worker.pending_prefill_tokens for worker in (await pipeline.client.overview()).workers]

        await until(lambda: _equals(pending(), [1200]))
        await until(lambda: _equals(pending(), [0]))
        assert (await handle.result(timeout=120)).token_ids == await _uncut("y" * 1200, 400)


class CutFails(EmulatedEngine):
    """Breaks where a move begins."""

    async def cut(self, request_id: str) -> Cut | None:
        raise RuntimeError("the engine cannot be cut")


async def test_a_move_that_fails_ends_its_worker_and_the_request_goes_on_elsewhere(
    redis_url: str, namespace: str
) -> None:
    """The request is given back at once: it does not stand still under a lease that is renewed."""
    async with open_pipeline(redis_url, namespace, steal_from="none", max_running=32, lease_s=30.0) as pipeline:
        pipeline.start("w0", speed=1.0, cost=CROWDED, make_engine=CutFails)
        pipeline.start("w1", speed=1.0, cost=CROWDED)
        handle = await _outgrow(pipeline, 300)
        _, failing = pipeline.workers.pop("w0")
        with pytest.raises(RuntimeError, match="cannot be cut"):
            async with asyncio.timeout(300):
                await failing
        pipeline.start("w0")  # whoever runs the workers starts it again
        assert (await handle.result(timeout=120)).token_ids == await _uncut("hello", 300)
        told = [line["what"] for line in await _ledger(pipeline, handle.id)]
        assert next(what for what in told if what in ("released", "hand-over")) == "released"


class CutWaits(EmulatedEngine):
    """Stands still where the request is cut and not yet released."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.has_cut, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def cut(self, request_id: str) -> Cut | None:
        made = await super().cut(request_id)
        self.has_cut.set()
        await self.may_go_on.wait()
        return made


@pytest.mark.parametrize("ending", [RequestCancelled, RequestExpired])
async def test_a_request_that_ends_while_it_moves_has_ended(
    redis_url: str, namespace: str, ending: type[Exception]
) -> None:
    """Its worker is between cut and release: it drops the request, nobody else gets it, the workers serve on."""
    async with open_pipeline(redis_url, namespace, steal_from="none", max_running=32) as pipeline:
        source = pipeline.start("w0", speed=1.0, cost=CROWDED, make_engine=CutWaits)
        target = pipeline.start("w1", speed=1.0, cost=CROWDED)
        engine = source.context.engine
        assert isinstance(engine, CutWaits)
        handle = await _outgrow(pipeline, 300)
        async with asyncio.timeout(300):
            await engine.has_cut.wait()
        if ending is RequestCancelled:
            assert await handle.cancel()
        else:  # its deadline has passed: upkeep sees it
            deadlines = Keys(namespace).deadlines
            await pipeline.executor.run(Call(None, (), ("ZADD", deadlines, 1, handle.id), int))
        read: list[int] = []
        with pytest.raises(ending):
            await _read(handle, read)
        engine.may_go_on.set()
        await until(lambda: true(all(s.request_id != handle.id for s in source.sessions)))

        assert 0 < len(read) < 300
        assert tuple(read) == (await _uncut("hello", 300))[: len(read)]
        assert all(line["what"] != "hand-over" for line in await _ledger(pipeline, handle.id))
        assert not target.active()
        after = await pipeline.client.enqueue("y" * 60, max_tokens=4)
        assert (await after.result(timeout=120)).worker == "w1"


async def _read(handle: AsyncHandle, ids: list[int]) -> None:
    async for chunk in handle.stream(timeout=120):
        ids += chunk.token_ids


async def test_a_newcomer_with_nothing_to_do_gets_running_requests(pipeline: Pipeline) -> None:
    """Nothing waits, one worker is crowded: it is asked and moves what pays, a few at a time; all end the same."""
    pipeline.start("w0", speed=1.0, cost=CROWDED)
    handles = [await pipeline.client.enqueue(f"p{i:02d}", max_tokens=150, ignore_eos=True) for i in range(12)]
    await pipeline.running("w0", 12)
    pipeline.start("w1", speed=1.0, cost=CROWDED)
    await pipeline.running("w1", 3)
    for index, handle in enumerate(handles):
        result = await handle.result(timeout=120)
        assert result.token_ids == await _uncut(f"p{index:02d}", 150)
    counts = (await pipeline.client.overview()).counts
    assert counts["steals_running"] >= 3
    assert (counts["done"], counts["live"]) == (12, 0)


async def test_a_newcomer_joins_the_stage_that_lacks_workers(pipeline: Pipeline) -> None:
    """The plan knows of an absent worker. Its stage's request may be stolen before the newcomer looks."""
    pipeline.start("w0")
    assert (await (await pipeline.client.enqueue("y", max_tokens=1)).result(timeout=120)).output_tokens == 1
    await pipeline.publish(*_stages((0, 40, ("w0",)), (40, None, ("gone",))))
    handle = await pipeline.client.enqueue("y" * 60, max_tokens=4)
    newcomer = pipeline.start("new")
    assert (await handle.result(timeout=120)).output_tokens == 4
    await until(lambda: true(newcomer.placement.stage == 1))


async def _publish_routing(pipeline: Pipeline, routing: Routing, *stages: StagePlan) -> None:
    plan = Plan(version=1, stages=stages, routing=routing)
    calls = Calls(Keys(pipeline.settings.namespace))
    verdict = await pipeline.executor.run(calls.publish(expected_version=0, version=1, body=plan_to_json(plan)))
    assert verdict is Verdict.OK


async def test_a_router_pushes_in_turn_and_nobody_steals(pipeline: Pipeline) -> None:
    """Under round robin each gets every second request and keeps it; those of one that leaves go to others."""
    for name in ("w0", "w1"):
        pipeline.start(name, speed=1.0, cost=CROWDED)
    await until(lambda: true(all(w.fleet_view.others() for w, _ in pipeline.workers.values())))
    await _publish_routing(pipeline, Routing.ROUND_ROBIN, *_stages((0, None, ("w0", "w1"))))
    handles = []
    for index in range(20):  # the even ones are long, the odd ones short: a queue would spread them
        length = 60 if index % 2 == 0 else 2
        handles.append(await pipeline.client.enqueue(f"{index:02d}", max_tokens=length, ignore_eos=True))
    workers = [(await handle.result(timeout=120)).worker for handle in handles]
    assert set(workers[::2]) != set(workers[1::2])
    assert len(set(workers[::2])) == len(set(workers[1::2])) == 1
    counts = (await pipeline.client.overview()).counts
    assert counts.get("steals_running", 0) == counts.get("steals_waiting", 0) == counts.get("handovers", 0) == 0

    handles = [await pipeline.client.enqueue("a", max_tokens=60, ignore_eos=True) for _ in range(40)]
    await pipeline.running("w0", 2)
    await pipeline.stop("w0")
    assert {(await handle.result(timeout=120)).output_tokens for handle in handles} == {60}


async def test_two_pools_split_by_prompt_length(pipeline: Pipeline) -> None:
    """Short prompts to one worker, long ones to the other."""
    for name in ("w0", "w1"):
        pipeline.start(name)
    await until(lambda: true(all(w.fleet_view.others() for w, _ in pipeline.workers.values())))
    await _publish_routing(pipeline, Routing.TWO_POOL, *_stages((0, 40, ("w0",)), (40, None, ("w1",))))
    handles = [(n, await pipeline.client.enqueue("b" * n, max_tokens=2)) for n in (5, 60, 39, 40, 5)]
    assert [(await h.result(timeout=120)).worker for n, h in handles] == ["w0", "w1", "w0", "w1", "w0"]


async def test_the_least_loaded_is_so_by_what_it_runs_now(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent one by one, each taken at once: no worker gets two more than the other, whatever it told last."""
    monkeypatch.setattr(
        "dispatcher.routing.service._LOOK_S", 0.0
    )  # published loads would be seen afresh each time
    for name in ("w0", "w1"):
        pipeline.start(name, speed=1.0, cost=CROWDED)
    await until(lambda: true(all(w.fleet_view.others() for w, _ in pipeline.workers.values())))
    await _publish_routing(pipeline, Routing.LEAST_LOADED, *_stages((0, None, ("w0", "w1"))))
    for index in range(1, 9):
        await pipeline.client.enqueue("a", max_tokens=1900, ignore_eos=True)

        async def all_run(number: int = index) -> bool:
            return sum(len(worker.active()) for worker, _ in pipeline.workers.values()) == number

        await until(all_run)
        numbers = sorted(len(worker.active()) for worker, _ in pipeline.workers.values())
        assert numbers[1] - numbers[0] <= 1
