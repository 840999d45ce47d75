"""A server at its memory limit: nothing new is accepted, everything accepted can still end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from l4queue.config import Settings
from l4queue.models import Plan, RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.keys import SOLO_STAGE
from l4queue.protocol.upkeep import Upkeep
from l4queue.protocol.wire import ServerFull
from tests.protocol.consistency import check
from tests.protocol.scene import Scene
from tests.protocol.server import RedisServer

S = RequestState
OPTIONS = ("--appendonly", "no", "--maxmemory-policy", "noeviction")


@pytest.fixture(scope="module")
def small_server(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server whose memory limit these tests set."""
    server = RedisServer(redis_executable, tmp_path_factory.mktemp("small"), OPTIONS).start()
    yield server
    server.kill()


@pytest.fixture
def full(small_server: RedisServer, namespace: str) -> Iterator[Scene]:
    """A deployment on it; `fill` puts it at its limit."""
    executor = Executor(small_server.url, retry_s=0.2)
    scene = Scene(executor, namespace)
    scene.raw.config_set("maxmemory", 0)
    yield scene
    scene.raw.config_set("maxmemory", 0)
    scene.close()
    executor.close()


def fill(scene: Scene) -> None:
    """Set the limit below what is in use: every command that may need memory is refused from now on."""
    scene.raw.config_set("maxmemory", 1)
    with pytest.raises(Exception, match="used memory"):
        scene.raw.set("any", "thing")


def _lapse(scene: Scene) -> None:
    """Let the lease end: the test's own write needs memory for a moment."""
    scene.raw.config_set("maxmemory", 0)
    scene.lapse()
    fill(scene)


def _running(scene: Scene, *ids: str) -> None:
    scene.register()
    for request_id in ids:
        scene.submit(request_id)
        scene.route(request_id)
    scene.take()


def test_a_full_server_accepts_nothing_and_says_so(full: Scene) -> None:
    """ServerFull names the remedy; nothing is half accepted, and a repeat afterwards succeeds."""
    full.submit("there")
    fill(full)
    before = full.dump()

    with pytest.raises(ServerFull, match="memory limit"):
        full.submit("new")
    with pytest.raises(ServerFull, match="memory limit"):
        full.executor.run_many(
            [full.reads.server_time_ms(), full.calls.publish(expected_version=0, version=1, body="")]
        )

    assert full.dump() == before
    assert full.submit("there").verdict is Verdict.DUP
    full.raw.config_set("maxmemory", 0)
    assert full.submit("new").verdict is Verdict.OK
    check(full)


def test_everything_accepted_drains_from_a_full_server(full: Scene) -> None:
    """From the inbox to the end: route, take, emit, settle, give back, renew, leave."""
    full.register()
    for request_id in "abc":
        full.submit(request_id)
    fill(full)

    assert [full.route(i) for i in "abc"] == [Verdict.OK] * 3
    assert [g.request_id for g in full.take(max_requests=2).grants] == ["a", "b"]
    assert full.emit("a", num=2) is Verdict.OK
    assert full.emit("a", offset=2, num=2) is Verdict.OK
    assert full.renew() is Verdict.OK
    assert full.release("b") is Verdict.OK
    assert full.settle("a", offset=4, num=2) is Verdict.OK
    assert full.settle("b", epoch=1) is Verdict.FENCED
    assert full.migrate() == 2
    followed = full.executor.run(full.calls.follow("n1", followed=["a", "c"], ttl_ms=60_000))
    assert [state for state, _ in followed.places] == [S.DONE, S.QUEUED]
    assert len(full.take(stage="1").grants) == 2
    assert full.settle("b", epoch=2, state=S.FAILED) is Verdict.OK
    assert full.retire() is Verdict.OK
    assert full.cancel("c") == (Verdict.OK, None)

    assert (full.counts()["live"], full.counts()["live_tokens"]) == (0, 0)
    assert full.shown("a") == [(1000, 1001), (1002, 1003), (1004, 1005), ()]
    check(full)


def test_a_full_server_refuses_and_cancels_and_expires(full: Scene) -> None:
    """In each state that has these ways out."""
    _running(full, "r1", "r2")
    for request_id in ("q1", "q2"):
        full.submit(request_id)
        full.route(request_id, stage="5")
    for request_id in ("s1", "s2", "s3"):
        full.submit(request_id)
    for request_id in ("r2", "q2", "s2"):
        full.overdue(request_id)
    fill(full)

    assert full.refuse("s3", raw=b"\xff") is Verdict.OK
    assert [full.cancel(i)[0] for i in ("r1", "q1", "s1")] == [Verdict.OK] * 3
    assert full.expire() == 3

    assert full.counts()["live"] == 0
    check(full)


def test_dead_workers_are_reaped_from_a_full_server(full: Scene) -> None:
    """Also into the solo queue and to dead letters, after a grace."""
    _running(full, "a")
    full.lapse()
    full.raw.set(full.keys.tick, 1)
    fill(full)

    assert full.reap(gap_ms=1000).was_graced is True
    _lapse(full)
    assert full.reap().num_requeued == 1
    for turn in range(2, 6):
        full.register()
        full.grant(stage="0" if turn == 2 else SOLO_STAGE)
        _lapse(full)
        reaped = full.reap()
        assert (reaped.num_requeued, reaped.num_dead) == ((1, 0) if turn < 5 else (0, 1))

    assert full.state() is S.DEAD
    check(full)


def test_blame_and_repair_work_on_a_full_server(full: Scene) -> None:
    """An engine that dies with its requests, and a reconciler that finds something missing."""
    _running(full, "a", "b")
    full.submit("c")
    full.raw.xdel(full.keys.inbox, full.entry("c"))
    fill(full)

    assert full.release("a", blame=True) is Verdict.OK
    full.raw.srem(full.keys.held("w1"), "b")
    assert full.repair("b") == "LEASE"
    full.raw.zrem(full.keys.queue("0"), "a")
    assert full.repair("a") == "QUEUE"
    assert full.repair("c") == "INBOX"

    assert sorted(full.waiting()) == ["a", "b"]


def test_upkeep_goes_on_while_the_server_is_full(full: Scene, small_server: RedisServer) -> None:
    """All of a dispatcher's rounds: a full server must not end the process that drains it."""
    _running(full, "a", "b")
    full.settle("a", num=1)
    full.lapse()
    fill(full)

    async def rounds() -> int:
        executor = AsyncExecutor(small_server.url)
        settings = Settings(namespace=full.keys.namespace, redis_url=small_server.url)
        upkeep = Upkeep(settings=settings, executor=executor)
        report = await upkeep.run_once(Plan.one_stage())
        await upkeep.measure_drain()
        await upkeep.repair_once()
        await executor.close()
        return report.num_requeued

    assert asyncio.run(rounds()) == 1
    check(full)


def test_a_full_server_is_made_room_on_by_packing_and_by_the_bound(full: Scene) -> None:
    """Both need memory for a moment and free more: they must not wait for somebody else to free it."""
    _running(full, "a", "b")
    for request_id in "ab":
        full.emit(request_id, num=2)
        full.settle(request_id, offset=2)
    before = full.record("a"), full.shown("a")
    fill(full)
    assert full.raw.memory_usage(full.keys.output("a")) > 4000

    assert full.pack().num_packed == 2

    assert full.raw.memory_usage(full.keys.output("a")) < 1000
    assert (full.record("a"), full.shown("a")) == before
    assert full.evict(max_bytes=1).num_dropped == 2
    assert full.counts()["result_bytes"] == 0
