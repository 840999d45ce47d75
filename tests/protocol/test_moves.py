"""Work that moves: own queues of workers, steals, hand-overs, what the ledger says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from l4queue.config import Settings
from l4queue.models import Plan, RequestState, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Move, MoveKind, Verdict
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import private_queue
from l4queue.protocol.upkeep import Upkeep
from tests.protocol.consistency import check
from tests.protocol.scene import PROMPT_TOKENS, Scene

S = RequestState
HANDOVER = Move(kind=MoveKind.HANDOVER, benefit_ms=12.5, cost_ms=2.0, kv="seg-1")
STEAL = Move(kind=MoveKind.STEAL, benefit_ms=5.0, cost_ms=1.0)


def _ledger(scene: Scene, request_id: str = "a") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in scene.executor.run(scene.reads.ledger(request_id))]
    assert [line["at_ms"] for line in lines] == sorted(line["at_ms"] for line in lines)
    return [{k: v for k, v in line.items() if k != "at_ms"} for line in lines]


def _plan(*highs: int) -> Plan:
    lows = (0, *highs)
    stages = tuple(
        StagePlan(low_tokens=low, high_tokens=high, num_workers=1)
        for low, high in zip(lows, (*highs, None), strict=True)
    )
    return Plan(version=1, stages=stages)


def test_a_hand_over_goes_to_one_worker_with_progress_and_ticket(scene: Scene) -> None:
    """Cut at a token boundary, queued for the target alone, resumed there under the next epoch."""
    scene.bring(S.RUNNING)
    scene.register("w2:x")
    assert scene.emit(num=3) is Verdict.OK
    assert scene.release(stage=private_queue("w2"), move=HANDOVER) is Verdict.OK
    assert scene.release(stage=private_queue("w2"), move=HANDOVER) is Verdict.DUP
    assert scene.emit(offset=3) is Verdict.FENCED

    grant = scene.grant("w2:x", stage="@w2", own_stage="1")

    assert (grant.epoch, grant.offset, grant.kv, grant.came_from) == (2, 3, "seg-1", "w1")
    assert grant.stage == scene.record().stage == "1", "from now on it belongs to the stage of its new worker"
    assert scene.emit("a", "w2:x", epoch=2, offset=3, num=2) is Verdict.OK
    assert scene.settle("a", "w2:x", epoch=2, offset=5, num=1) is Verdict.OK
    assert scene.shown() == [(1000, 1001, 1002), (2003, 2004), (2005,), ()]
    assert scene.counts()["handovers"] == 1
    lines = _ledger(scene)
    assert [line["what"] for line in lines] == ["hand-over", "taken", "resumed"]
    assert lines[0] == {
        "what": "hand-over",
        "worker": "w1",
        "to": "@w2",
        "offset": 3,
        "benefit_ms": 12.5,
        "cost_ms": 2.0,
        "kv": True,
    }
    assert lines[2]["gap_ms"] >= 0
    check(scene)


@pytest.mark.parametrize("ending", [S.CANCELLED, S.EXPIRED])
@pytest.mark.parametrize("point", ["cut", "released", "taken"])
def test_an_ending_amid_a_move_is_the_only_one(scene: Scene, ending: RequestState, point: str) -> None:
    """Whoever has the request at that moment, or nobody: what was shown stays, and nothing follows it."""
    scene.bring(S.RUNNING)
    scene.register("w2:x")
    assert scene.emit(num=3) is Verdict.OK  # the last tokens before the cut
    if point != "cut":
        assert scene.release(stage=private_queue("w2"), move=HANDOVER) is Verdict.OK
    if point == "taken":
        scene.grant("w2:x", stage="@w2", own_stage="1")
    if ending is S.CANCELLED:
        assert scene.cancel() == (Verdict.OK, None)
    else:
        scene.overdue()
        assert scene.expire() == 1

    assert scene.state() is ending
    assert scene.release(stage=private_queue("w2"), move=HANDOVER) is Verdict.FENCED
    assert scene.take("w2:x", stage="@w2", own_stage="1").grants == ()
    for worker, epoch in (("w1", 1), ("w2:x", 2)):
        assert scene.emit("a", worker, epoch, 3) is Verdict.FENCED
        assert scene.settle("a", worker, epoch, 3) is Verdict.FENCED
    assert scene.shown() == [(1000, 1001, 1002), ()]
    owner = {"cut": "w1", "taken": "w2:x"}.get(point)
    told = {name: scene.raw.xlen(scene.keys.control(name)) for name in ("w1", "w2:x")}
    assert told == {name: int(name == owner) for name in told}
    check(scene)


def test_the_gap_of_a_move_is_counted_once(scene: Scene) -> None:
    """With the first tokens after it, not with later ones."""
    scene.bring(S.RUNNING)
    scene.emit(num=1)
    scene.release(move=STEAL)
    assert scene.counts()["steals_running"] == 1
    scene.grant()
    for offset in (1, 2, 3):
        assert scene.emit(epoch=2, offset=offset, num=1) is Verdict.OK
    assert scene.counts()["resumes"] == 1
    assert [line["what"] for line in _ledger(scene)] == ["steal", "taken", "resumed"]


def test_the_end_may_be_the_first_that_a_new_worker_writes(scene: Scene) -> None:
    """It ends the gap of the move as well."""
    scene.bring(S.RUNNING)
    scene.emit(num=1)
    scene.release(move=HANDOVER)
    scene.grant()
    assert scene.settle(epoch=2, offset=1, num=2) is Verdict.OK
    assert scene.counts()["resumes"] == 1
    assert [line["what"] for line in _ledger(scene)] == ["hand-over", "taken", "resumed"]


def test_a_suspect_is_not_stolen_from_anybody(scene: Scene) -> None:
    """Whichever stage the worker belongs to that runs it alone."""
    scene.bring(S.RUNNING)
    scene.crash()
    scene.grant()
    scene.crash()
    assert scene.grant(stage="solo", own_stage="1").stage == "solo"
    assert "steals_waiting" not in scene.counts()
    assert [line["what"] for line in _ledger(scene)] == ["lost", "taken", "lost", "taken"]


def test_own_queues_leave_no_trace(scene: Scene) -> None:
    """Names of workers come and go without end: what an empty queue leaves behind would pile up."""
    scene.bring(S.RUNNING)
    for epoch, name in enumerate(("w2", "w3", "gone"), start=1):
        scene.register(name)
        worker = "w1" if epoch == 1 else ("w2", "w3")[epoch - 2]
        assert scene.release(worker=worker, epoch=epoch, stage=private_queue(name)) is Verdict.OK
        if name != "gone":
            scene.grant(name, stage=private_queue(name), own_stage="0")
    assert scene.backlog() == {"0": 0, "@gone": PROMPT_TOKENS}
    assert scene.cancel()[0] is Verdict.OK
    assert scene.backlog() == {"0": 0}
    check(scene)


def test_a_ticket_is_good_for_one_move(scene: Scene) -> None:
    """After a crash the KV cache of the move before is history."""
    scene.bring(S.RUNNING)
    scene.emit(num=1)
    scene.release(move=HANDOVER)
    assert scene.grant().kv == "seg-1"
    scene.crash()
    assert scene.grant().kv == ""
    assert [line["what"] for line in _ledger(scene)] == ["hand-over", "taken", "lost", "taken"]


def test_what_is_taken_from_another_stage_is_stolen(scene: Scene) -> None:
    """It counts, and its ledger says from where and for what; it goes back there if its worker dies."""
    scene.bring(S.QUEUED)
    scene.register()
    assert scene.grant(own_stage="1", benefit_ms=30.0, cost_ms=4.0).stage == "0"
    assert scene.counts()["steals_waiting"] == 1
    (line,) = _ledger(scene)
    assert line == {
        "what": "stolen", "worker": "w1", "from": "0", "to": "1", "benefit_ms": 30.0, "cost_ms": 4.0
    }  # fmt: skip
    scene.crash()
    assert scene.waiting("0") == ["a"]


def test_the_own_stage_is_no_theft(scene: Scene) -> None:
    """Nor is what was queued for this worker alone. An ordinary life leaves no ledger."""
    scene.bring(S.QUEUED)
    scene.register()
    scene.grant(own_stage="0")
    assert "steals_waiting" not in scene.counts()
    assert _ledger(scene) == []


def test_a_ledger_is_bounded(scene: Scene) -> None:
    """A request that is moved for ever fills its own ledger, not the server."""
    scene.bring(S.RUNNING)
    for epoch in range(1, 200):
        assert scene.release(epoch=epoch, move=STEAL) is Verdict.OK
        scene.grant()
    assert len(scene.raw.hget(scene.keys.request("a"), "ledger")) < 8200


def test_an_expired_request_is_not_computed(scene: Scene) -> None:
    """Its deadline passed while it waited and nobody had looked yet."""
    scene.submit("a", deadline_ms=1)
    scene.route("a")
    scene.submit("b")
    scene.route("b")
    scene.register()
    scene.raw.hset(scene.keys.request("a"), "deadline_ms", 1)
    assert [grant.request_id for grant in scene.take().grants] == ["b"]
    record = scene.executor.run(scene.reads.record("a"))
    assert record is not None
    assert record.state is S.EXPIRED
    check(scene)


def test_waiting_requests_move_by_their_lengths(scene: Scene) -> None:
    """A boundary belongs to the upper stage; what is right stays as it is; the head can be left out."""
    for score, (request_id, num) in enumerate((("a", 4), ("b", 2), ("c", 3), ("d", 4))):
        scene.submit(request_id)
        scene.route(request_id, token_ids=[1] * num, score=float(score))
    answer = scene.executor.run(scene.calls.migrate(source="0", highs=(3,), limit=2, skip=1))
    assert (answer.num_moved, answer.num_seen) == (1, 2)
    assert (scene.waiting("0"), scene.waiting("1")) == (["a", "b", "d"], ["c"])
    answer = scene.executor.run(scene.calls.migrate(source="0", highs=(3,), limit=9))
    assert (answer.num_moved, answer.num_seen) == (2, 3)
    assert (scene.waiting("0"), scene.waiting("1")) == (["b"], ["a", "c", "d"])
    assert _ledger(scene, "b") == []
    assert _ledger(scene, "c") == [{"what": "rerouted", "from": "0", "to": "1"}]
    check(scene)


def test_what_was_generated_counts_when_waiting_requests_move(scene: Scene) -> None:
    """Three prompt tokens and two of its own: it belongs where requests of five tokens do."""
    scene.bring(S.QUEUED)
    scene.register()
    scene.grant()
    scene.emit(num=2)
    scene.release()
    scene.executor.run(scene.calls.migrate(source="0", highs=(5,), limit=9))
    assert scene.waiting("1") == ["a"]
    check(scene)


@pytest.mark.parametrize(("num_sharers", "num_taken"), [(1, 6), (2, 2), (3, 1), (100, 1)])
def test_sharers_leave_work_to_each_other(scene: Scene, num_sharers: int, num_taken: int) -> None:
    """Each takes half its share at a time, and at least one."""
    for request_id in "abcdef":
        scene.submit(request_id)
        scene.route(request_id)
    scene.register()
    assert len(scene.take(num_sharers=num_sharers).grants) == num_taken


async def test_upkeep_saves_what_waits_for_a_worker_that_is_gone(scene: Scene, redis_url: str) -> None:
    """It goes to the stage of its length; what waits for the living stays."""
    settings = Settings(namespace=scene.keys.namespace, redis_url=redis_url)
    executor = AsyncExecutor(settings.redis_url)
    upkeep = Upkeep(settings=settings, executor=executor)
    scene.register("alive:1")
    for request_id, stage, num in (("a", "@alive", 1), ("b", "@gone", 2), ("c", "@gone", 9)):
        scene.submit(request_id)
        scene.route(request_id, stage=stage, token_ids=[1] * num)

    report = await upkeep.run_once(_plan(5))

    assert report.num_migrated == 2
    assert [scene.waiting(s) for s in ("@alive", "@gone", "0", "1")] == [["a"], [], ["b"], ["c"]]
    assert _ledger(scene, "c") == [{"what": "rerouted", "from": "@gone", "to": "1"}]
    await executor.close()
    check(scene)


async def test_upkeep_goes_by_the_plan_in_force(scene: Scene, redis_url: str) -> None:
    """A process that has heard of no new plan for long does not take the waiting out of its stages."""
    settings = Settings(namespace=scene.keys.namespace, redis_url=redis_url)
    executor = AsyncExecutor(settings.redis_url)
    upkeep = Upkeep(settings=settings, executor=executor)
    assert scene.publish(0, 1, plan_to_json(_plan(2))) is Verdict.OK
    for request_id, stage in (("a", "1"), ("b", "2")):
        scene.submit(request_id)
        scene.route(request_id, stage=stage)

    report = await upkeep.run_once(Plan.one_stage())

    assert report.num_migrated == 1
    assert [scene.waiting(s) for s in ("0", "1", "2")] == [[], ["a", "b"], []]
    await executor.close()


@pytest.mark.parametrize("number", [1, 450])
async def test_a_new_plan_takes_the_waiting_along(scene: Scene, redis_url: str, number: int) -> None:
    """Each request waits in the stage of its length afterwards, in its old order; page by page."""
    settings = Settings(namespace=scene.keys.namespace, redis_url=redis_url)
    executor = AsyncExecutor(settings.redis_url)
    upkeep = Upkeep(settings=settings, executor=executor)
    calls = scene.calls
    for index in range(number):
        scene.submit(f"r{index}", max_live_tokens=10_000)
        scene.executor.run(
            calls.route(
                f"r{index}",
                entry_id="0-1",
                stage=str(index % 2),
                score=float(index),
                token_ids=[1] * (1 + index % 7),
                max_tokens=1,
                plan_version=0,
                bucket=0,
            )
        )

    moved = await upkeep.reroute(_plan(3, 6))

    where = [0 if 1 + i % 7 < 3 else 1 if 1 + i % 7 < 6 else 2 for i in range(number)]
    for stage in range(3):
        expected = [f"r{i}" for i in range(number) if where[i] == stage]
        assert scene.executor.run(scene.reads.queue_ids(str(stage), limit=number)) == expected
    assert moved == sum(stage != i % 2 for i, stage in enumerate(where))
    assert await upkeep.reroute(_plan(3, 6)) == 0
    await executor.close()


def test_a_message_reaches_a_live_worker_only(scene: Scene) -> None:
    """What is sent to one that is gone leaves no key behind."""
    scene.register("w2:x")
    assert scene.executor.run(scene.calls.ask("w2:x", message="{}")) is Verdict.OK
    assert scene.executor.run(scene.calls.ask("w3:x", message="{}")) is Verdict.LOST
    assert scene.raw.xlen(scene.keys.control("w2:x")) == 1
    assert not scene.raw.exists(scene.keys.control("w3:x"))
    check(scene)
