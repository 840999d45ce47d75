"""Plans, histograms, migration, deadlines, repair: the slow side of the protocol."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from l4queue.config import Settings
from l4queue.cost.step import StepCost
from l4queue.models import Plan, RequestState, StagePlan
from l4queue.protocol.calls import Verdict
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.upkeep import Upkeep, UpkeepReport
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState


def two_stages(high_tokens: int) -> Plan:
    """A plan whose second stage begins at this length."""
    stages = (
        StagePlan(low_tokens=0, high_tokens=high_tokens, num_workers=1),
        StagePlan(low_tokens=high_tokens, high_tokens=None, num_workers=1),
    )
    return Plan(version=1, stages=stages)


def test_a_plan_replaces_only_the_version_it_was_made_from(scene: Scene) -> None:
    """Two planners: the second one's plan is stale; a repeat after a lost reply is a duplicate."""
    assert scene.publish(0, 1, '{"a": 1}') is Verdict.OK
    assert scene.publish(0, 1, '{"a": 1}') is Verdict.DUP
    assert scene.publish(0, 1, '{"b": 1}') is Verdict.STALE
    assert scene.publish(0, 2) is Verdict.STALE
    assert scene.publish(2, 3) is Verdict.STALE
    assert scene.publish(1, 2, '{"c": 1}') is Verdict.OK
    assert scene.publish(1, 2, '{"a": 1}') is Verdict.STALE

    assert scene.executor.run(scene.reads.plan()) == (2, '{"c": 1}')
    history = scene.executor.run(scene.reads.plan_history(count=9))
    assert [(version, body) for _, version, body in history] == [(2, '{"c": 1}'), (1, '{"a": 1}')]


def test_without_a_plan_the_version_is_zero(scene: Scene) -> None:
    """The plan of an empty deployment."""
    assert scene.executor.run(scene.reads.plan()) == (0, None)


def test_waiting_requests_move_with_score_and_tokens(scene: Scene) -> None:
    """Bounded, in serving order; what runs or has ended stays where it is."""
    for index, request_id in enumerate("abcd"):
        scene.submit(request_id)
        scene.route(request_id, score=float(index))
    scene.register()
    assert scene.grant().request_id == "a"
    scene.cancel("d")

    assert scene.migrate(limit=0) == 0
    assert scene.migrate(limit=1) == 1
    assert (scene.waiting("0"), scene.waiting("1")) == (["c"], ["b"])
    assert scene.migrate() == 1
    assert scene.migrate() == 0
    assert scene.waiting("1") == ["b", "c"]
    assert scene.backlog() == {"0": 0, "1": 6}
    assert scene.grant(stage="1").stage == "1"
    check(scene)


def test_a_migration_wakes_the_workers_of_its_target(scene: Scene) -> None:
    """They wait on their own wake-up stream."""
    scene.bring(S.QUEUED)
    assert scene.raw.xlen(scene.keys.wake("1")) == 0
    scene.migrate()
    assert scene.raw.xlen(scene.keys.wake("1")) == 1


def test_every_entry_into_a_queue_wakes_its_workers(scene: Scene) -> None:
    """Routing, giving back, reaping: each time."""
    scene.bring(S.RUNNING)
    scene.release()
    scene.grant()
    scene.crash()

    assert scene.raw.xlen(scene.keys.wake("0")) == 3


def test_a_heartbeats_counters_are_added_once(scene: Scene) -> None:
    """A repeat with the same sequence number renews the lease and adds nothing."""
    scene.register(sequence=1, histogram={"d:3": 5})
    for _ in range(3):
        assert scene.renew(sequence=2, histogram={"d:3": 2, "c:3": 7}) is Verdict.OK

    assert scene.executor.run(scene.reads.histogram()) == {"d:3": "7", "c:3": "7"}


def test_a_lost_worker_adds_no_counters(scene: Scene) -> None:
    """It keeps them for its next incarnation; counting now would count twice."""
    scene.register()
    scene.crash()
    scene.lapse()
    scene.reap()

    assert scene.renew(histogram={"d:3": 5}) is Verdict.LOST
    assert scene.executor.run(scene.reads.histogram()) == {}


def test_a_heartbeat_publishes_load_and_extends_the_lease(scene: Scene) -> None:
    """As others read it."""
    now_ms = scene.executor.run(scene.reads.server_time_ms())
    cost = StepCost(alpha_ms=2.5, beta_ms=0.1, gamma_ms=0.0, pi_ms=0.0, psi_ms=0.0)
    told = {"load": {"worker_id": "w1", "num_running": 3}, "cost": cost.to_dict()}
    scene.register(lease_ms=5_000, load=json.dumps(told))
    ((name, expires_ms),) = scene.executor.run(scene.reads.incarnations())

    view = scene.executor.run(scene.reads.worker(name, expires_ms))

    assert view is not None
    assert (view.worker_id, view.load.num_running, view.cost) == ("w1", 3, cost)
    assert now_ms + 5_000 <= expires_ms <= now_ms + 65_000
    assert scene.executor.run(scene.reads.worker("nobody", 0)) is None


def test_routing_counts_arrivals_once(scene: Scene) -> None:
    """By length bucket; a second route adds nothing."""
    scene.submit()
    entry = scene.entry()
    for _ in range(2):
        scene.route(entry=entry, bucket=4, token_ids=[1] * 9)

    assert scene.executor.run(scene.reads.histogram()) == {"a:4": "1", "p:4": "9"}
    assert scene.counts()["prompt_tokens"] == 9


def test_a_deadline_ends_a_request_once_and_only_when_it_has_passed(scene: Scene) -> None:
    """Waiting, running or not yet routed; the record says where it was."""
    scene.submit("later", deadline_ms=3_600_000)
    for request_id in "abc":
        scene.submit(request_id, deadline_ms=3_600_000)
        scene.overdue(request_id)
    scene.route("b")
    scene.route("c", stage="1")
    scene.register()
    scene.grant(stage="1")

    assert scene.expire() == 3
    assert scene.expire() == 0

    assert {scene.state(i) for i in "abc"} == {S.EXPIRED}
    assert [scene.record(i).error for i in "abc"] == [
        f"its deadline passed while it was {was}" for was in ("submitted", "queued", "running")
    ]
    assert scene.state("later") is S.SUBMITTED
    check(scene)


def test_a_finished_requests_deadline_is_gone(scene: Scene) -> None:
    """Nothing is left to expire."""
    scene.submit(deadline_ms=3_600_000)
    scene.cancel()
    assert scene.raw.zcard(scene.keys.deadlines) == 0


@pytest.mark.parametrize("state", [None, *S])
def test_what_is_in_order_is_not_repaired(scene: Scene, state: RequestState | None) -> None:
    """Twice over."""
    scene.bring(state)
    before = scene.dump()
    assert [scene.repair(), scene.repair()] == ["FINE", "FINE"]
    assert scene.dump() == before


def test_a_forgotten_submission_returns_to_the_inbox(scene: Scene) -> None:
    """Its own entry counts, not that others are there; a young one may still be on its way."""
    scene.submit("other")
    scene.submit()
    scene.raw.xdel(scene.keys.inbox, scene.entry())

    assert scene.repair(forgotten_ms=60_000) == "FINE"
    assert scene.repair() == "INBOX"
    assert scene.repair() == "FINE"
    assert scene.route() is Verdict.OK
    check(scene)


def test_a_request_without_a_queue_entry_is_queued_again(scene: Scene) -> None:
    """With its score; the alarm is the answer."""
    scene.bring(S.QUEUED)
    scene.raw.zrem(scene.keys.queue("0"), "a")
    scene.raw.hset(scene.keys.backlog, "0", 0)

    assert scene.repair() == "QUEUE"
    assert scene.repair() == "FINE"
    check(scene)


@pytest.mark.parametrize("damage", ["held", "worker", "owner"])
def test_a_running_request_without_a_lease_is_queued_again_without_blame(scene: Scene, damage: str) -> None:
    """Whatever of its lease is missing."""
    scene.bring(S.RUNNING)
    if damage == "held":
        scene.raw.srem(scene.keys.held("w1"), "a")
    elif damage == "worker":
        scene.raw.zrem(scene.keys.workers, "w1")
    else:
        scene.raw.hdel(scene.keys.request("a"), "owner")

    assert scene.repair() == "LEASE"

    assert scene.state() is S.QUEUED
    assert scene.record().crashes == 0
    assert scene.emit() is Verdict.FENCED


def test_dispatchers_that_died_long_ago_leave_the_group(scene: Scene) -> None:
    """Unless something is pending for them; without a group there is nobody to forget."""
    assert scene.executor.run(scene.calls.forget(idle_ms=0)) == 0
    scene.submit()
    scene.read_inbox("gone")
    scene.submit("b")
    ((entry, _),) = scene.read_inbox("holds")
    assert entry
    scene.cancel("a")

    assert scene.executor.run(scene.calls.forget(idle_ms=3_600_000)) == 0
    assert scene.executor.run(scene.calls.forget(idle_ms=0)) == 1

    (left,) = scene.raw.xinfo_consumers(scene.keys.inbox, "d")
    assert left["name"] == b"holds"


async def test_a_round_of_upkeep_does_all_that_is_due(scene: Scene, redis_url: str) -> None:
    """Reap, expire, migrate in one; then the slow part: drain rate and repair."""
    settings = Settings(namespace=scene.keys.namespace, redis_url=redis_url)
    executor = AsyncExecutor(redis_url)
    upkeep = Upkeep(settings=settings, executor=executor)
    for request_id, stage in (("a", "0"), ("b", "3"), ("c", "0"), ("d", "0")):
        scene.submit(request_id)
        scene.route(request_id, stage=stage)
    scene.register()
    assert scene.grant().request_id == "a"
    scene.settle("a", num=2)
    assert scene.grant().request_id == "c"
    scene.lapse()
    scene.overdue("d")
    scene.cancel("b")
    scene.submit("e")
    scene.route("e", stage="3")

    report = await upkeep.run_once(two_stages(high_tokens=1))
    again = await upkeep.run_once(two_stages(high_tokens=1))

    assert (report.num_requeued, report.num_expired, report.num_migrated) == (1, 1, 1)
    assert (again.num_requeued, again.num_expired, again.num_migrated) == (0, 0, 0)
    assert scene.waiting("1") == ["e"]
    assert await upkeep.measure_drain() > 0
    scene.raw.zrem(scene.keys.queue("1"), "e")
    scene.raw.hset(scene.keys.backlog, "1", 0)
    mended = 0
    while mended == 0:
        mended += await upkeep.repair_once()
    await executor.close()
    assert scene.waiting("1") == ["e"]
    check(scene)


def test_upkeep_packs_and_bounds_what_has_ended(
    scene: Scene, redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All that is due in one round; what goes early for want of room is counted, and said in the log."""
    monkeypatch.setattr("l4queue.protocol.upkeep.PACK_AGE_MS", 0)
    scene.register()
    for request_id in (f"r{n}" for n in range(450)):
        scene.submit(request_id)
        scene.cancel(request_id)

    async def round_of(**over: Any) -> UpkeepReport:
        executor = AsyncExecutor(redis_url)
        settings = Settings(namespace=scene.keys.namespace, redis_url=redis_url, **over)
        report = await Upkeep(settings=settings, executor=executor).run_once(Plan.one_stage())
        await executor.close()
        return report

    assert asyncio.run(round_of()).num_packed == 450
    kept = scene.counts()["result_bytes"]
    assert not caplog.records

    report = asyncio.run(round_of(max_result_bytes=kept // 2))

    assert 225 <= report.num_dropped < 232
    assert scene.counts()["results_dropped"] == report.num_dropped
    assert scene.counts()["result_bytes"] <= kept // 2
    assert "L4_MAX_RESULT_BYTES" in caplog.text
