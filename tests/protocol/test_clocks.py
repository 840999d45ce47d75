"""Clocks that differ or go back: what lies in Redis's future is cut to what is possible, and causes are told."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.app import make_app
from dispatcher.planner.tasks import Pace
from l4queue.config import Settings, load_settings
from l4queue.models import RequestState
from l4queue.observe.health import (
    clock_ahead_s,
    clock_note,
    dispatcher_alive,
    dispatcher_heard_s,
    planner_idle_s,
)
from l4queue.observe.telemetry import read_telemetry
from l4queue.observe.watch import Watch
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol.calls import Verdict
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.inbox import Inbox
from l4queue.protocol.records import BackgroundQuota, in_order
from l4queue.protocol.upkeep import Upkeep
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState
HOUR_MS = 3_600_000


def _now_ms(scene: Scene) -> int:
    return scene.executor.run(scene.reads.server_time_ms())


def _expiry_ms(scene: Scene, worker: str = "w1") -> int:
    return dict(scene.executor.run(scene.reads.incarnations()))[worker]


def _turn_back(scene: Scene, request_id: str = "a") -> None:
    """As if the clock had gone back an hour since this request came."""
    key = scene.keys.request(request_id)
    for name in ("submitted_ms", "queued_ms", "started_ms", "deadline_ms"):
        if scene.raw.hexists(key, name):
            scene.raw.hincrby(key, name, HOUR_MS)
    if scene.raw.zscore(scene.keys.deadlines, request_id) is not None:
        scene.raw.zincrby(scene.keys.deadlines, HOUR_MS, request_id)


def test_a_dead_worker_does_not_live_on_in_the_future(scene: Scene) -> None:
    """Its lease is cut to its term from now, and it's reaped when that has passed."""
    scene.bring(S.RUNNING)
    scene.register(lease_ms=200)
    scene.raw.zadd(scene.keys.workers, {"w1": _now_ms(scene) + HOUR_MS})

    scene.reap(grace_ms=200)

    assert _expiry_ms(scene) <= _now_ms(scene) + 200
    scene.lapse()
    assert scene.reap(grace_ms=200).num_requeued == 1
    check(scene)


def test_a_living_worker_keeps_its_longer_term(scene: Scene) -> None:
    """A worker with a long lease among reapers with a short one."""
    scene.register(lease_ms=60_000)
    before_ms = _expiry_ms(scene)

    scene.reap(grace_ms=200)

    assert _expiry_ms(scene) == before_ms


def test_a_worker_of_an_older_release_is_cut_to_ten_graces(scene: Scene) -> None:
    """It does not tell its term."""
    scene.register(lease_ms=5_000)
    scene.raw.hdel(scene.keys.worker("w1"), "lease_ms")
    scene.raw.zadd(scene.keys.workers, {"w1": _now_ms(scene) + HOUR_MS})

    scene.reap(grace_ms=5_000)

    assert _expiry_ms(scene) <= _now_ms(scene) + 50_000


def test_background_is_not_held_back_by_a_visit_from_the_future(scene: Scene) -> None:
    """When another request last came is at most now."""
    scene.register()
    scene.submit()
    scene.route(score=BACKGROUND + _now_ms(scene))
    scene.raw.hset(scene.keys.foreground, "0", _now_ms(scene) + HOUR_MS)
    hold = BackgroundQuota(for_ms=1.0, overdue_ms=float(HOUR_MS))
    assert scene.take(hold=hold).grants == ()

    scene.reap()

    assert scene.executor.run(scene.reads.foreground_ms("0")) <= _now_ms(scene)
    while not scene.take(hold=hold).grants:  # once a millisecond has passed
        continue


@pytest.mark.parametrize("state", [S.SUBMITTED, S.QUEUED, S.RUNNING])
def test_a_deadline_from_the_future_goes_back_with_its_request(scene: Scene, state: RequestState) -> None:
    """It has as long as it was given, from now; a second look changes nothing, and none is an alarm."""
    scene.submit(deadline_ms=60_000)
    scene.bring(state)
    _turn_back(scene)

    assert [scene.repair(forgotten_ms=60_000) for _ in range(2)] == ["FINE", "FINE"]

    record = scene.record()
    assert record.submitted_ms <= _now_ms(scene)
    assert record.deadline_ms == record.submitted_ms + 60_000
    assert scene.raw.zscore(scene.keys.deadlines, "a") == record.deadline_ms
    assert scene.counts().get("repairs", 0) == 0
    check(scene)


def test_requests_from_the_future_do_not_wait_behind_all_others(scene: Scene) -> None:
    """Their place in the order goes back with them, to an eighth of a millisecond, background by class."""
    now_ms = _now_ms(scene)
    for request_id, score in (("a", now_ms + HOUR_MS + 0.125), ("b", BACKGROUND + now_ms + HOUR_MS)):
        scene.submit(request_id)
        scene.route(request_id, score=score)
        _turn_back(scene, request_id)
    ahead_ms = scene.record("a").submitted_ms - now_ms

    assert [scene.repair(i, forgotten_ms=60_000) for i in "ab"] == ["FINE", "FINE"]

    scores = [scene.raw.zscore(scene.keys.queue("0"), i) for i in "ab"]
    assert scores[0] == pytest.approx(now_ms + HOUR_MS + 0.125 - ahead_ms, abs=2_000)
    assert scores[0] % 1 == 0.125
    assert scores[1] is not None
    assert BACKGROUND <= scores[1] <= BACKGROUND + _now_ms(scene)


def test_a_move_from_the_future_has_no_gap(scene: Scene) -> None:
    """Sums of gaps go up only."""
    scene.bring(S.RUNNING)
    scene.emit()
    scene.release()
    scene.raw.hincrby(scene.keys.request("a"), "moved_ms", HOUR_MS)
    scene.grant()

    assert scene.emit(epoch=2, offset=2) is Verdict.OK
    assert scene.counts()["resume_gap_ms"] == 0


async def test_entries_of_a_dead_dispatcher_are_adopted_in_spite_of_the_clock(
    scene: Scene, redis_url: str
) -> None:
    """Redis calls them fresh for an hour; a dispatcher sees by its own clock that nobody works on them."""
    scene.submit()
    scene.read_inbox("dead")
    _deliver_in_the_future(scene)
    executor = AsyncExecutor(redis_url)
    inbox = Inbox(executor, scene.keys, consumer="living")

    assert await inbox.adopt(min_idle_s=0.05, count=10) == []
    while not (adopted := await inbox.adopt(min_idle_s=0.05, count=10)):
        continue
    claimed = await inbox.claim(adopted[0])
    await executor.close()

    assert adopted == [scene.entry().encode()]
    assert claimed is not None
    assert (claimed[0][1][b"i"], claimed[1]) == (b"a", 2)


def _deliver_in_the_future(scene: Scene) -> None:
    """Write the inbox anew with its one delivery an hour ahead: no command of Redis sets it so."""
    dump = bytearray(scene.raw.dump(scene.keys.inbox))
    idle_ms = scene.raw.xpending_range(scene.keys.inbox, "d", "-", "+", 1)[0]["time_since_delivered"]
    now_ms = _now_ms(scene)
    for at_ms in range(now_ms - idle_ms - 1000, now_ms + 1):
        written = struct.pack("<Q", at_ms) + b"\x01"  # of the delivery: time, and how often
        if (at := dump.find(written)) >= 0:
            dump[at : at + 8] = struct.pack("<Q", at_ms + HOUR_MS)
    dump[-8:] = struct.pack("<Q", _crc64(dump[:-8]))
    scene.raw.restore(scene.keys.inbox, 0, bytes(dump), replace=True)
    scene.raw.xautoclaim(scene.keys.inbox, "d", "probe", 1, "0-0", justid=True)
    assert scene.raw.xpending_range(scene.keys.inbox, "d", "-", "+", 1)[0]["consumer"] == b"dead"


def _crc64(data: bytes | bytearray) -> int:
    """Of Jones, as Redis signs dumps."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x95AC9329AC4BC9B5 if crc & 1 else 0)
    return crc


async def test_the_drain_rate_leaves_out_steps_back(scene: Scene, redis_url: str) -> None:
    """Two seconds of work with a step back of an hour between them are two seconds."""
    for at_ms in (HOUR_MS, HOUR_MS + 1_000, 10_000, 11_000):
        fact = {"i": "x", "s": "done", "p": 50, "o": 50, "a": 0, "q": "", "b": "", "f": "", "d": at_ms}
        scene.raw.xadd(scene.keys.finished, fact | {"g": "0", "w": "w", "c": 0})
    executor = AsyncExecutor(redis_url)

    rate = await Upkeep(settings=Settings(namespace=scene.keys.namespace), executor=executor).measure_drain()
    await executor.close()

    assert rate == 200.0


@given(st.lists(st.none() | st.integers(0, 2**42), max_size=6))
def test_times_of_a_request_never_go_back(times_ms: list[int | None]) -> None:
    """None stays None, order that is right stays as it is, and nothing gets earlier."""
    ordered = in_order(*times_ms)
    known = [time_ms for time_ms in ordered if time_ms is not None]

    assert known == sorted(known)
    assert [time_ms is None for time_ms in ordered] == [time_ms is None for time_ms in times_ms]
    assert all(a is None or b is None or a >= b for a, b in zip(ordered, times_ms, strict=True))
    assert in_order(*ordered) == ordered


def test_the_age_of_the_inbox_is_that_of_its_request(scene: Scene) -> None:
    """Ids of a stream go on from the last one when the clock goes back: they tell no age then."""
    scene.raw.xadd(scene.keys.inbox, {"i": "gone"}, id=f"{_now_ms(scene) + HOUR_MS}-0")
    scene.raw.xtrim(scene.keys.inbox, maxlen=0)
    scene.submit()
    scene.raw.hincrby(scene.keys.request("a"), "submitted_ms", -5_000)

    assert read_telemetry(scene.executor, scene.keys.namespace).inbox_age_s >= 5.0
    assert Watch(scene.executor, scene.keys.namespace).look().ages_ms["in"] >= 5_000


def test_health_takes_no_sign_of_life_from_the_future(scene: Scene) -> None:
    """Neither a dispatcher's, whose time to live grew by an hour, nor a planner's."""
    namespace = scene.keys.namespace
    scene.executor.run(dispatcher_alive(scene.keys, "host"))
    assert dispatcher_heard_s(scene.executor, namespace, "host") is not None
    scene.raw.pexpire(scene.keys.dispatcher("host"), HOUR_MS)
    scene.executor.run(scene.calls.remember(f'{{"at_ms": {_now_ms(scene) + HOUR_MS}}}'))

    assert dispatcher_heard_s(scene.executor, namespace, "host") is None
    assert planner_idle_s(scene.executor, namespace) is None


@pytest.mark.parametrize(
    ("ahead_s", "words"), [(-30.2, "30 s behind Redis's"), (3600.0, "3600 s ahead of Redis's"), (0.4, None)]
)
def test_a_difference_of_clocks_is_told(ahead_s: float, words: str | None) -> None:
    """In words that name the cause."""
    note = clock_note(ahead_s)
    assert (note is None) if words is None else (note is not None and f"this host's clock is {words}" in note)


def test_the_difference_is_measured(executor: Executor) -> None:
    """By this host's clock, which is half a minute behind here."""
    ahead_s = clock_ahead_s(executor, clock=lambda: time.time() - 30.0)

    assert ahead_s == pytest.approx(-30.0, abs=5.0)


class _Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def test_a_round_is_run_whatever_the_clocks_of_beat_and_planner_say(clock: _Clock) -> None:
    """Messages carry no expiry; of those that piled up one is run, and the next of its period again."""
    app, pace = make_app(load_settings()), Pace(clock=clock)
    assert all("expires" not in entry.get("options", {}) for entry in app.conf.beat_schedule.values())

    assert pace.is_due("replan", interval_s=10.0)
    clock.now_s += 12.0  # it took longer than its period
    pace.ended("replan")
    assert not pace.is_due("replan", interval_s=10.0)
    assert pace.is_due("refine", interval_s=2.0)
    clock.now_s += 5.0
    assert pace.is_due("replan", interval_s=10.0)
