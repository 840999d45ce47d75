"""Round trips: how many commands a request takes on its way, and what each of them carries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable
from typing import Any

import pytest

from dispatcher.routing.service import Dispatcher
from l4queue import AsyncClient, Settings
from l4queue.cli.bench.queue.counts import commands_of
from l4queue.models import Plan, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import AsyncExecutor, Executor
from tests.protocol.scene import Scene
from tests.services.pipeline import ByteTokenizer

NUM_IDS = 100_000


async def _sent(url: str, work: Awaitable[Any]) -> Counter[str]:
    """Commands that clients send meanwhile."""
    sent, _, _ = await commands_of(Settings(redis_url=url).redis_url, work)
    return sent


def _end(scene: Scene, request_id: str) -> None:
    """Somebody computes it."""
    scene.route(request_id)
    scene.grant()
    scene.emit(request_id)
    scene.settle(request_id, offset=2)


async def test_a_round_of_the_dispatcher_is_two_round_trips(redis_url: str, namespace: str) -> None:
    """The inbox, then the queues: no record is read of short prompts, nor of ids of any number, and no plan."""
    settings = Settings(redis_url=redis_url, namespace=namespace, max_model_len=2 * NUM_IDS, engine="emulated")
    executor, tokenizer = AsyncExecutor(redis_url), ByteTokenizer()
    tokenizer.max_model_len = 2 * NUM_IDS
    dispatcher = Dispatcher(settings=settings, executor=executor, tokenizer=tokenizer, name="d")  # type: ignore[arg-type]
    async with AsyncClient(settings=settings) as client:
        try:
            await dispatcher.run_once(block_s=0.01)
            prompts = [{"prompt": "hello"}, {"token_ids": [5] * NUM_IDS}, {"messages": [_says("hi")]}]
            handles = await client.enqueue_many(prompts, max_tokens=9)
            sent = await _sent(redis_url, dispatcher.run_once(block_s=1.0))
            assert sent == {"xreadgroup": 1, "evalsha": 1}
            assert [(await handle.status()).prompt_tokens for handle in handles][:2] == [5, NUM_IDS]

            await client.enqueue_many(prompts, max_tokens=9)
            read_bytes = await executor.run(_num_sent_bytes())
            assert await dispatcher.run_once(block_s=1.0) == 3
            assert await executor.run(_num_sent_bytes()) - read_bytes < 20_000

            (handle,) = await client.enqueue_many(["a long text " * 1000], max_tokens=9)
            sent = await _sent(redis_url, dispatcher.run_once(block_s=1.0))
            assert sent == {"xreadgroup": 1, "hmget": 1, "evalsha": 1}
            assert (await handle.status()).prompt_tokens == 12_000
        finally:
            await executor.close()


async def test_a_plan_that_has_changed_is_read_before_anything_is_queued(
    redis_url: str, namespace: str, scene: Scene
) -> None:
    """However long nothing came: the first to be routed by the plan before is routed anew, and counts once."""
    settings = Settings(redis_url=redis_url, namespace=namespace, max_model_len=1000, engine="emulated")
    executor = AsyncExecutor(redis_url)
    dispatcher = Dispatcher(settings=settings, executor=executor, tokenizer=ByteTokenizer(), name="d")  # type: ignore[arg-type]
    async with AsyncClient(settings=settings) as client:
        try:
            for version, low in enumerate((40, 10), start=1):
                await dispatcher.run_once(block_s=0.01)
                plan = _two_stages(version, low)
                scene.publish(version - 1, version, plan_to_json(plan))
                handles = await client.enqueue_many(["x" * 20, "x" * 60], max_tokens=9)
                assert await dispatcher.run_once(block_s=1.0) == 2
                stages = [(await handle.status()).stage for handle in handles]
                assert (stages, dispatcher.plan) == ([str(int(low == 10)), "1"], plan)
                assert [(await handle.status()).plan for handle in handles] == [version] * 2
            assert sum(dispatcher.counters.routed.values()) == 4
        finally:
            await executor.close()


def _two_stages(version: int, low_tokens: int) -> Plan:
    return Plan(
        version=version,
        stages=(
            StagePlan(low_tokens=0, high_tokens=low_tokens, num_workers=1),
            StagePlan(low_tokens=low_tokens, high_tokens=None, num_workers=1),
        ),
    )


def _says(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _num_sent_bytes() -> Call[int]:
    """Bytes that the server has sent so far."""
    return Call(None, (), ("INFO", "stats"), lambda found: int(found["total_net_output_bytes"]))


async def test_a_result_is_one_round_trip_from_its_end(client: AsyncClient, scene: Scene, redis_url: str) -> None:
    """Mail tells of ends: nobody asks where a request is before that, nor once the end is known."""
    handles = [await client.enqueue("x", max_tokens=9) for _ in range(3)]
    scene.register()
    for handle in handles:
        _end(scene, handle.id)

    async def ends() -> None:
        assert [handle async for handle in client.as_completed(handles)]

    for work in (handles[0].result(), handles[1].result(), ends(), handles[2].result()):
        sent = await _sent(redis_url, work)
        del sent["xread"]  # the one that waits for more may be among them
        assert sent == ({"xrange": 1} if work.__name__ == "result" else {})


async def test_a_lost_mail_is_missed_within_a_second(client: AsyncClient, scene: Scene) -> None:
    """A server may forget it; with little time the record is looked at first."""
    handles = [await client.enqueue("x", max_tokens=9) for _ in range(2)]
    scene.register()
    for handle in handles:
        _end(scene, handle.id)
    assert scene.raw.delete(scene.keys.mailbox(client._core.client_id)) == 1

    assert (await handles[0].result(timeout=0)).output_tokens == 2
    assert (await handles[1].result()).output_tokens == 2


async def test_an_end_that_a_server_has_forgotten_is_waited_for(client: AsyncClient, scene: Scene) -> None:
    """Mail told of it, the record does not know it: what counts is the record."""
    handle = await client.enqueue("x", max_tokens=9)
    scene.register()
    _end(scene, handle.id)
    assert [one async for one in client.as_completed([handle])] == [handle]
    record = scene.keys.request(handle.id)
    scene.raw.hset(record, "state", "running")
    scene.raw.xdel(scene.keys.output(handle.id), "2-1")

    with pytest.raises(TimeoutError):
        await handle.result(timeout=0.2)
    scene.raw.hset(record, "state", "done")
    assert (await handle.result()).output_tokens == 2


def test_large_calls_take_several_round_trips(executor: Executor, scene: Scene) -> None:
    """What is packed and sent again is bounded; the order is kept, and so is the number of values."""
    pieces: list[int] = []
    send = executor._send

    async def seen(calls: Any) -> Any:
        pieces.append(len(calls))
        return await send(calls)

    executor._send = seen  # type: ignore[method-assign]
    try:
        calls = [
            scene.calls.submit(
                f"r{number}",
                digest="",
                body="{}",
                kind="p",
                prompt=b"x" * (400_000 if number % 2 else 10),
                charge_tokens=1,
                max_live_tokens=10**9,
                max_live_bytes=10**9,
                deadline_ms=0,
                ttl_ms=60_000,
                client_id="c1",
            )
            for number in range(50)
        ]
        replies = executor.run_many(calls)
    finally:
        del executor._send  # type: ignore[misc]  # the class's own again
    assert [reply.request_id for reply in replies] == [f"r{number}" for number in range(50)]
    assert sum(pieces) == 50
    assert pieces == [21, 20, 9]
