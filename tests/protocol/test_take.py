"""Taking work: serving order, room, replay of a lost reply, stale entries, lapsed leases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from l4queue.cost.step import StepCost
from l4queue.models import RequestState
from l4queue.observe.overview import QueueView, read_overview, stage_loads
from l4queue.policy.admission import AdmissionBudget, BackgroundBudget, WaitingRequest, admit, unbounded_budget
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol.calls import Verdict
from l4queue.protocol.keys import SOLO_STAGE
from l4queue.protocol.records import BackgroundQuota
from tests.conftest import SEED
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState


def _queue(scene: Scene, *requests: tuple[str, float, int]) -> None:
    for request_id, score, tokens in requests:
        scene.submit(request_id, max_live_tokens=10**9)
        scene.route(request_id, score=score, token_ids=[7] * tokens)


def _taken(scene: Scene, **over: object) -> list[str]:
    return [g.request_id for g in scene.take(**over).grants]  # type: ignore[arg-type]


def test_the_lowest_score_is_served_first_and_ties_by_id(scene: Scene) -> None:
    """Scores compare as numbers, also large and negative ones; equal scores have one fixed order."""
    scene.register()
    big = 1.8e12
    _queue(scene, ("d", big + 0.5, 1), ("c", big, 1), ("b", 7.0, 1), ("a", 7.0, 1), ("e", -3.5, 1), ("f", 10.0, 1))

    assert _taken(scene) == ["e", "a", "b", "f", "c", "d"]


def test_a_grant_carries_all_a_worker_needs(scene: Scene) -> None:
    """Also where to resume, in which epoch, and how often its worker was lost."""
    scene.submit(body='{"params": {}}', deadline_ms=50_000)
    scene.route(score=12.5, token_ids=[5, 2**31])
    scene.register()
    first = scene.grant()
    scene.emit(num=3)
    scene.crash()

    grant = scene.grant()

    assert (first.epoch, first.offset, first.crashes) == (1, 0, 0)
    assert (grant.epoch, grant.offset, grant.crashes) == (2, 3, 1)
    assert (grant.body, grant.packed_ids) == (b'{"params": {}}', b"\x05\0\0\0\0\0\0\x80")
    assert (grant.prompt_tokens, grant.score, grant.stage) == (2, 12.5, "0")
    assert grant.submitted_ms == scene.record().submitted_ms
    assert grant.deadline_ms == grant.submitted_ms + 50_000


def test_the_same_nonce_hands_the_same_grants_back(scene: Scene) -> None:
    """However often; what has been finished or lost meanwhile is left out; nothing new is taken."""
    scene.register()
    _queue(scene, ("a", 1, 1), ("b", 2, 1), ("c", 3, 1), ("d", 4, 1))
    first = scene.take(nonce="x", max_requests=3)
    assert scene.take(nonce="x", max_requests=3) == first
    scene.settle("a")
    scene.release("b")
    assert [g.request_id for g in scene.take(nonce="y", max_requests=1).grants] == ["b"]

    assert [g.request_id for g in scene.take(nonce="x", max_requests=1).grants] == ["d"], "a newer nonce forgets"
    assert [g.request_id for g in scene.take(nonce="x", max_requests=1).grants] == ["d"]
    check(scene)


def test_a_replay_leaves_out_what_is_no_longer_held_under_that_epoch(scene: Scene) -> None:
    """Released and taken again by the same worker is another lease."""
    scene.register()
    scene.register("w2")
    _queue(scene, ("a", 1, 1), ("b", 2, 1), ("c", 3, 1))
    scene.take(nonce="x")
    scene.cancel("a")
    scene.release("b")
    assert scene.grant("w2").request_id == "b"

    assert [g.request_id for g in scene.take(nonce="x").grants] == ["c"]


def test_a_replay_is_answered_even_when_the_lease_has_lapsed(scene: Scene) -> None:
    """Otherwise a worker that renews again would hold requests that it never heard of."""
    scene.register()
    _queue(scene, ("a", 1, 1))
    first = scene.take(nonce="x")
    scene.lapse()

    assert scene.take(nonce="x") == first


def test_nothing_is_taken_under_a_lapsed_lease_until_it_is_renewed(scene: Scene) -> None:
    """The reaper would blame at once what it takes; a renewal before the reaper mends it."""
    scene.register()
    _queue(scene, ("a", 1, 1))
    scene.lapse()

    assert scene.take().verdict is Verdict.LOST
    assert scene.renew() is Verdict.OK
    assert _taken(scene) == ["a"]


def test_an_unregistered_worker_takes_nothing(scene: Scene) -> None:
    """Neither before it registers nor after it was reaped."""
    _queue(scene, ("a", 1, 1))

    assert scene.take().verdict is Verdict.LOST
    assert scene.renew() is Verdict.LOST
    scene.register()
    scene.lapse()
    scene.reap()
    assert scene.take().verdict is Verdict.LOST
    assert scene.waiting() == ["a"]
    check(scene)


def test_entries_of_another_stage_or_of_nobody_are_cleared_away(scene: Scene) -> None:
    """A stale entry must neither run nor be counted as waiting for ever."""
    scene.register()
    _queue(scene, ("a", 5, 1))
    scene.raw.zadd(scene.keys.queue("0"), {"ghost": 1.0})
    scene.raw.zadd(scene.keys.queue("1"), {"a": 1.0})
    scene.raw.hset(scene.keys.backlog, "1", 99)

    assert _taken(scene, stage="1") == []
    assert scene.backlog()["1"] == 0, "an empty queue has no backlog"
    assert _taken(scene) == ["a"]
    check(scene)


def test_what_is_too_late_does_not_use_up_the_take(scene: Scene) -> None:
    """Nor do stale entries: whoever may take two requests gets two that can run, and the late ones end."""
    scene.register()
    _queue(scene, *((f"late{i}", i, 1) for i in range(9)), ("a", 20, 1), ("b", 21, 1), ("c", 22, 1))
    for i in range(9):
        scene.raw.hset(scene.keys.request(f"late{i}"), "deadline_ms", 1)

    assert _taken(scene, max_requests=2) == ["a", "b"]
    assert {scene.state(f"late{i}") for i in range(9)} == {RequestState.EXPIRED}
    check(scene)


def test_epochs_rise_by_one_with_each_lease(scene: Scene) -> None:
    """The fencing token never repeats, whoever takes it and why ever it came back."""
    scene.bring(S.QUEUED)
    scene.register("w1")
    scene.register("w2")
    seen = []
    for turn in range(1, 13):
        worker = f"w{turn % 2 + 1}"
        seen.append(scene.grant(worker).epoch)
        scene.release("a", worker, turn)

    assert seen == list(range(1, 13))


@pytest.mark.parametrize("case", range(6))
def test_room_is_used_as_the_policy_decides(scene: Scene, case: int) -> None:
    """The script and `admit` agree on random queues and rooms: simulator and live system are one."""
    rng = np.random.default_rng([SEED, case])
    for turn in range(12):
        stage = f"{case * 100 + turn}"
        worker = f"w{turn}"
        scene.register(worker)
        waiting = []
        for i in range(int(rng.integers(0, 7))):
            request_id, tokens = f"{turn}-{i}", int(rng.integers(1, 9))
            is_background = bool(rng.integers(2))
            score = float(i) + (BACKGROUND if is_background else 0.0)
            scene.submit(request_id, max_live_tokens=10**9)
            scene.route(request_id, stage=stage, score=score, token_ids=[1] * tokens)
            waiting.append(
                WaitingRequest(request_id=request_id, length_tokens=tokens, is_background=is_background)
            )
        room = AdmissionBudget(
            num_requests=int(rng.integers(0, 6)),
            kv_tokens=int(rng.integers(0, 30)),
            prefill_tokens=int(rng.integers(0, 15)),
            growth_tokens=int(rng.integers(0, 4)),
            is_idle=bool(rng.integers(2)),
            reason="any",
            longest_tokens=int(rng.integers(2, 12)),
        )
        background = BackgroundBudget(
            num_requests=int(rng.integers(0, 4)), longest_tokens=int(rng.integers(1, 12)), reason="any"
        )
        came = any(not w.is_background for w in waiting)
        expected = list(admit(room, waiting, background=background if came else None).request_ids)

        taken = scene.take(
            worker,
            stage,
            budget=room,
            hold=BackgroundQuota(
                for_ms=60_000,
                max_requests=background.num_requests,
                longest_tokens=background.longest_tokens,
                overdue_ms=10**13,
            ),
        )

        assert [g.request_id for g in taken.grants] == expected, room
    check(scene)


HELD = BackgroundQuota(for_ms=60_000.0, overdue_ms=60_000.0)
"""While another request came within a minute: no background request, but for those a minute overdue."""


def _now_ms(scene: Scene) -> float:
    return float(scene.executor.run(scene.reads.server_time_ms()))


def _background(scene: Scene, *requests: tuple[str, float, int]) -> None:
    now_ms = _now_ms(scene)
    _queue(scene, *((request_id, BACKGROUND + now_ms + score, tokens) for request_id, score, tokens in requests))


def test_background_is_held_back_only_while_others_come_to_the_stage(scene: Scene) -> None:
    """Nobody else has ever come: all of it. Another came just now: none. Another came to another stage: all."""
    scene.register()
    _background(scene, ("b1", 1, 1), ("b2", 2, 1))
    assert _taken(scene, hold=replace(HELD, for_ms=1e15)) == [], "so long that it does not matter who came"
    assert _taken(scene, hold=HELD, max_requests=1) == ["b1"]
    scene.submit("a")
    scene.route("a", score=1.0)

    assert _taken(scene, hold=HELD) == ["a"]
    assert _taken(scene, hold=HELD) == []
    assert _taken(scene, hold=replace(HELD, max_requests=1)) == ["b2"]
    _background(scene, ("b3", 1, 1), ("b4", 2, 1), ("b5", 3, 1), ("b6", 4, 1))
    assert _taken(scene, hold=replace(HELD, max_requests=2)) == ["b3", "b4"]
    assert _taken(scene, hold=HELD, own_stage="1") == ["b5", "b6"], "what counts is the taker's own stage"
    check(scene)


def test_background_that_is_held_back_holds_up_nobody(scene: Scene) -> None:
    """Not by its place at the head, nor by its length, nor by its share of what may be taken."""
    scene.register()
    _background(scene, *((f"b{i}", -1000.0 - i, 50) for i in range(9)))
    _queue(scene, ("a", _now_ms(scene), 1), ("c", _now_ms(scene) + 5, 1))

    for hold in (HELD, replace(HELD, max_requests=9, longest_tokens=49)):
        assert _taken(scene, max_requests=1, is_idle=False, hold=hold)[0] in "ac"
    assert _taken(scene, hold=HELD) == []
    assert scene.backlog()["0"] == 450
    check(scene)


def test_background_that_finds_no_room_holds_up_nobody_either(scene: Scene) -> None:
    """An ordinary request that does not fit ends the take; a background one is passed over."""
    scene.register()
    _background(scene, ("b", -1000.0, 50))
    _queue(scene, ("a", _now_ms(scene), 1))

    full = replace(unbounded_budget(10, reason="test", is_idle=False), kv_tokens=20, growth_tokens=1)
    assert _taken(scene, budget=full) == [], "overdue: it counts as an ordinary one"
    assert _taken(scene, budget=full, hold=BackgroundQuota(overdue_ms=60_000.0)) == ["a"]
    check(scene)


def test_the_order_of_both_classes_is_by_score_without_the_class(scene: Scene) -> None:
    """Background has its place among all others; ties go to the others."""
    scene.register()
    now_ms = _now_ms(scene)
    _background(scene, ("b1", 10, 1), ("b2", 30, 1), ("b3", 30, 1))
    _queue(scene, ("a1", now_ms + 5, 1), ("a2", now_ms + 30, 1), ("a3", now_ms + 99, 1))
    now_ms = _now_ms(scene) - now_ms  # the clock went on between the two

    assert _taken(scene) in (["a1", "b1", "a2", "b2", "b3", "a3"], ["a1", "a2", "b1", "b2", "b3", "a3"])


def test_overdue_background_is_served_as_all_others(scene: Scene) -> None:
    """It counts as none, is taken in its place, and is not told to be background any more."""
    scene.register()
    _background(scene, ("late", -60_001.0, 1), ("soon", -30_000.0, 1))
    _queue(scene, ("a", _now_ms(scene), 1))

    taken = scene.take(hold=HELD)

    assert [(g.request_id, g.is_background) for g in taken.grants] == [("late", False), ("a", False)]
    assert [(g.request_id, g.is_background) for g in scene.take(hold=replace(HELD, max_requests=1)).grants] == [
        ("soon", True)
    ]
    check(scene)


def test_dropped_entries_do_not_let_background_overtake(scene: Scene) -> None:
    """Whoever may take two gets the first two in order, also when what came before them is only cleared away."""
    scene.register()
    now_ms = _now_ms(scene)
    _background(scene, ("b", 20, 1))
    _queue(scene, ("gone", now_ms + 1, 1), ("a1", now_ms + 2, 1), ("a2", now_ms + 3, 1))
    scene.raw.hset(scene.keys.request("gone"), "deadline_ms", 1)

    assert _taken(scene, max_requests=2) == ["a1", "a2"]


def test_sharers_leave_each_other_work_of_each_class(scene: Scene) -> None:
    """A long queue of background is no reason to take all of the others."""
    scene.register()
    _background(scene, *((f"b{i}", i, 1) for i in range(8)))
    _queue(scene, *((f"a{i}", float(i), 1) for i in range(4)))

    assert _taken(scene, num_sharers=2, hold=HELD) == ["a0"]
    assert _taken(scene, num_sharers=2, hold=replace(HELD, max_requests=9)) == ["a1", "b0", "b1"]


def test_only_what_is_not_background_is_noted_and_only_for_stages(scene: Scene) -> None:
    """What is pushed to one worker says nothing of a stage; names of workers would fill the hash."""
    _background(scene, ("b", 1, 1))
    scene.submit("p")
    scene.route("p", stage="@w1")
    assert scene.raw.hgetall(scene.keys.foreground) == {}

    before_ms = _now_ms(scene)
    scene.submit("a")
    scene.route("a", stage="1")

    assert before_ms <= (scene.executor.run(scene.reads.foreground_ms("1")) or 0) <= _now_ms(scene)
    assert scene.executor.run(scene.reads.foreground_ms("0")) is None
    assert scene.executor.run(scene.reads.num_foreground("0")) == 0
    assert scene.executor.run(scene.reads.num_foreground("1")) == 1


def test_what_is_held_back_is_out_of_play_for_those_who_weigh_queues(scene: Scene) -> None:
    """Else a batch that waits would look like a stage that drains for ever, worth stealing from at any price."""
    _background(scene, ("b1", 1, 30), ("b2", 2, 30))
    cost = StepCost(alpha_ms=7.0, beta_ms=0.0, gamma_ms=0.0, pi_ms=1.0, psi_ms=0.0)

    def looks(quiet_ms: float) -> tuple[QueueView | None, int, int]:
        found = read_overview(scene.executor, scene.keys.namespace)
        (load,) = stage_loads(found, expected_output_tokens=0.0, cost=cost, quiet_ms=quiet_ms)
        return found.queues["0"], load.queued_requests, load.queued_tokens

    assert looks(60_000.0)[1:] == (2, 60), "nobody else has come"
    scene.submit("a")
    scene.route("a", token_ids=[1] * 3)

    queue, number, tokens = looks(60_000.0)
    assert queue is not None
    assert (queue.num_requests, queue.tokens, queue.num_foreground) == (3, 63, 1)
    assert (number, tokens) == (1, 21), "in proportion"
    assert looks(0.0)[1:] == (3, 63)


def test_a_take_that_finds_nothing_writes_nothing(scene: Scene) -> None:
    """Under `appendfsync always` it would cost an fsync. A later one under the same nonce takes what has come."""
    scene.register()
    before = scene.dump(), _num_changes(scene)

    assert scene.take(nonce="n1").grants == ()
    assert scene.take(stage=SOLO_STAGE).grants == ()
    assert (scene.dump(), _num_changes(scene)) == before
    scene.submit()
    scene.route()
    (grant,) = scene.take(nonce="n1").grants
    assert scene.take(nonce="n1").grants == (grant,)
    assert scene.take(nonce="n2").grants == ()
    assert scene.take(nonce="n1").grants == (grant,), "nothing was taken since"


def _num_changes(scene: Scene) -> int:
    """Writes that the server has counted."""
    return int(scene.raw.info("persistence")["rdb_changes_since_last_save"])
