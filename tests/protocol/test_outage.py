"""Scripts flushed, server killed, connections cut, callers cancelled: nothing lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from l4queue.errors import ServiceUnavailable
from l4queue.models import RequestState
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.executor import AsyncExecutor, Executor
from tests.conftest import SEED
from tests.protocol.consistency import check
from tests.protocol.proxy import Cut, CuttingProxy
from tests.protocol.scene import Scene
from tests.protocol.server import RedisServer

IDS = [f"r{i}" for i in range(12)]


def _life(scene: Scene) -> None:
    """Twelve requests from submit to their end, each step as one batch where the product batches."""
    scene.register()
    for request_id in IDS:
        assert scene.submit(request_id).verdict in (Verdict.OK, Verdict.DUP)
    for request_id in IDS:
        assert scene.route(request_id, score=float(IDS.index(request_id))) in (Verdict.OK, Verdict.DUP)
    grants = scene.take(max_requests=12).grants
    assert [g.request_id for g in grants] == IDS
    for offset in (0, 2):
        emits = [_emit(scene, i, offset) for i in IDS]
        assert set(scene.executor.run_many(emits)) <= {Verdict.OK, Verdict.DUP}
    assert scene.release(IDS[0]) in (Verdict.OK, Verdict.DUP)
    again = scene.grant()
    assert (again.request_id, again.epoch, again.offset) == (IDS[0], 2, 4)
    for request_id in IDS:
        epoch = 2 if request_id == IDS[0] else 1
        assert scene.settle(request_id, epoch=epoch, offset=4, num=1) in (Verdict.OK, Verdict.DUP)


def _emit(scene: Scene, request_id: str, offset: int) -> Call[Verdict]:
    ids = scene.tokens(1, offset, 2)
    return scene.calls.emit(
        request_id, incarnation="w1", epoch=1, offset=offset, token_ids=ids, text="".join(f"{i}," for i in ids)
    )


def _assert_lived(scene: Scene) -> None:
    check(scene)
    assert all(scene.state(i) is RequestState.DONE for i in IDS)
    assert scene.shown("r1") == [(1000, 1001), (1002, 1003), (1004,), ()]
    counts = scene.counts()
    assert (counts["live"], counts["live_tokens"], counts["live_bytes"], counts["done"]) == (0, 0, 0, 12)


def test_flushed_scripts_are_loaded_again_in_the_middle_of_a_batch(scene: Scene) -> None:
    """NOSCRIPT is answered by loading; the batch keeps its order, so a settle never overtakes its emit."""
    scene.bring(RequestState.RUNNING)
    calls = [
        _emit(scene, "a", 0),
        scene.reads.server_time_ms(),
        Call(None, (), ("SCRIPT", "FLUSH"), lambda r: r),
        _emit(scene, "a", 2),
        scene.reads.record("a"),
    ]

    first, _, _, second, record = scene.executor.run_many(calls)

    assert (first, second) == (Verdict.OK, Verdict.OK)
    assert record is not None
    assert record.offset == 4
    check(scene)


async def test_the_asynchronous_door_loads_flushed_scripts_too(scene: Scene, redis_url: str) -> None:
    """The same on an event loop."""
    scene.bring(RequestState.RUNNING)
    executor = AsyncExecutor(redis_url)
    flush: Call[Any] = Call(None, (), ("SCRIPT", "FLUSH"), lambda r: r)

    replies = await executor.run_many([flush, _emit(scene, "a", 0), _emit(scene, "a", 2)])
    await executor.close()

    assert replies[1:] == [Verdict.OK, Verdict.OK]


def test_a_second_flush_while_scripts_are_loaded_is_only_a_retry(
    scene: Scene, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two administrators, or two restarts: the door tries again instead of giving up."""
    scene.bring(RequestState.RUNNING)
    executor = Executor(redis_url)
    sent = executor._send
    flushes = iter(range(3))

    def flush_first(calls: Any) -> Any:
        if next(flushes, None) is not None:
            scene.raw.script_flush()
        return sent(calls)

    monkeypatch.setattr(executor, "_send", flush_first)

    assert executor.run(_emit(scene, "a", 0)) is Verdict.OK
    executor.close()


def test_a_killed_server_loses_nothing_it_acknowledged(durable_server: RedisServer) -> None:
    """SIGKILL in the middle of a stream of submits, AOF with fsync on every write, scripts gone: all are there."""
    executor = Executor(durable_server.url, retry_s=20.0)
    scene = Scene(executor, "kill")
    accepted: list[str] = []
    enough = threading.Event()

    def submit_many() -> None:
        writer = Scene(Executor(durable_server.url, retry_s=20.0), "kill")
        for i in range(1500):
            if writer.submit(f"r{i}", max_live_tokens=10**9).verdict in (Verdict.OK, Verdict.DUP):
                accepted.append(f"r{i}")
            if len(accepted) in (300, 800):
                enough.set()
        writer.close()
        writer.executor.close()

    thread = threading.Thread(target=submit_many)
    thread.start()
    for _ in range(2):
        enough.wait(120)
        enough.clear()
        durable_server.restart()
    thread.join()

    assert len(accepted) == 1500
    scene.raw.connection_pool.disconnect()
    scene = Scene(executor, "kill")
    assert scene.counts()["live"] == 1500
    assert scene.raw.xlen(scene.keys.inbox) == 1500
    states = executor.run_many([scene.reads.record(i) for i in accepted])
    assert all(r is not None and r.state is RequestState.SUBMITTED for r in states)
    scene.close()
    executor.close()


def test_a_life_goes_on_over_restarts_of_the_server(durable_server: RedisServer) -> None:
    """A restart between any two steps: scripts reload, leases stand, the outcome is the same."""
    scene = Scene(Executor(durable_server.url, retry_s=20.0), "restarts")
    scene.bring(RequestState.RUNNING)
    durable_server.restart()
    scene.raw.connection_pool.disconnect()
    assert scene.emit() is Verdict.OK
    durable_server.restart()
    assert scene.emit() is Verdict.DUP
    assert scene.renew() is Verdict.OK
    assert scene.settle(offset=2, num=1) is Verdict.OK
    durable_server.restart()
    assert scene.settle(offset=2, num=1) is Verdict.DUP
    fresh = Scene(scene.executor, "restarts")
    check(fresh)
    assert fresh.shown() == [(1000, 1001), (1002,), ()]
    for one in (scene, fresh):
        one.close()
    scene.executor.close()


def _each(cut: Cut, every: int) -> Callable[[int], Cut]:
    return lambda n: cut if n % every == every - 1 else None


def _at_random(seed: int) -> Callable[[int], Cut]:
    rng = np.random.default_rng(seed)
    choices: list[Cut] = ["before", "after", None, None]
    return lambda _: choices[int(rng.integers(4))]


@pytest.mark.parametrize(
    "plan",
    [_each("before", 2), _each("after", 2), _each("after", 3), _at_random(SEED), _at_random(SEED + 1)],
    ids=["requests lost", "replies lost", "some replies lost", "random", "random too"],
)
def test_cut_connections_change_nothing(
    redis_server: RedisServer, namespace: str, plan: Callable[[int], Cut]
) -> None:
    """Every second request or reply is lost: the end is the same as without a fault."""
    with CuttingProxy(redis_server.port, plan) as proxy:
        faulty = Scene(Executor(proxy.url, retry_s=30.0), namespace)
        faulty.raw = Scene(Executor(redis_server.url), namespace).raw  # the test itself looks without faults
        _life(faulty)
        faulty.executor.close()
    clean = Scene(Executor(redis_server.url), namespace)
    _assert_lived(clean)
    assert proxy.num_cuts > 5
    for one in (faulty, clean):
        one.close()
    clean.executor.close()


@pytest.mark.parametrize("plan", [_each("after", 2), _at_random(SEED)], ids=["replies lost", "random"])
async def test_the_asynchronous_door_survives_cut_connections(
    redis_server: RedisServer, namespace: str, scene: Scene, plan: Callable[[int], Cut]
) -> None:
    """Concurrent emits of many requests, each in order, through a proxy that cuts."""
    scene.register()
    for request_id in IDS:
        scene.submit(request_id)
        scene.route(request_id)
    scene.take(max_requests=12)
    with CuttingProxy(redis_server.port, plan) as proxy:
        executor = AsyncExecutor(proxy.url, retry_s=30.0)

        async def live(request_id: str) -> list[Verdict]:
            return [await executor.run(_emit(scene, request_id, offset)) for offset in range(0, 10, 2)]

        verdicts = await asyncio.gather(*(live(i) for i in IDS))
        await executor.close()

    assert {v for each in verdicts for v in each} <= {Verdict.OK, Verdict.DUP}
    assert all(len(scene.shown(i)) == 5 for i in IDS)
    check(scene)


async def test_cancelled_calls_never_mix_replies(redis_server: RedisServer, scene: Scene) -> None:
    """Half of the callers give up in mid-flight: whoever waits on gets the answer to its own question."""
    rng = np.random.default_rng(SEED)
    for index, request_id in enumerate(IDS):
        scene.submit(request_id, charge_tokens=index + 1)
    with CuttingProxy(redis_server.port, lambda _: None, delay_s=0.002) as proxy:
        executor = AsyncExecutor(proxy.url, retry_s=30.0, max_connections=4)
        wrong = cancelled = 0

        async def ask(index: int, *, patience_s: float, is_batch: bool) -> None:
            nonlocal wrong, cancelled
            field: Call[int] = Call(None, (), ("HGET", scene.keys.request(IDS[index]), "charge_tokens"), int)
            try:
                async with asyncio.timeout(patience_s):
                    found = await executor.run_many([field] * 3) if is_batch else [await executor.run(field)]
                wrong += any(value != index + 1 for value in found)
            except TimeoutError:
                cancelled += 1

        for _ in range(20):
            impatient = [float(s) for s in rng.uniform(0.0, 0.02, size=40)]
            picks = [int(i) for i in rng.integers(len(IDS), size=40)]
            await asyncio.gather(
                *(ask(i, patience_s=s, is_batch=n % 2 == 0) for n, (i, s) in enumerate(zip(picks, impatient)))  # noqa: B905
            )
        for index in range(len(IDS)):
            await ask(index, patience_s=10.0, is_batch=True)
        await executor.close()

    assert wrong == 0
    assert cancelled > 50


def test_a_server_that_stays_away_is_reported_with_its_address(redis_executable: str) -> None:
    """After `retry_s` the caller gets ServiceUnavailable that says where and what to try; no password in it."""
    executor = Executor("redis://:secret@127.0.0.1:1/0", retry_s=0.1)
    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:1.*doctor") as caught:
        executor.run(Call(None, (), ("PING",), lambda r: r))
    assert "secret" not in str(caught.value)
    executor.close()
    executor.close()
