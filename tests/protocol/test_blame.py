"""Dead workers: what they held continues, nobody innocent is condemned, an outage is not a mass death."""

from __future__ import annotations

import pytest

from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.keys import SOLO_STAGE
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState


def test_a_dead_workers_requests_continue_from_their_checkpoint(scene: Scene) -> None:
    """Back in their queue with one crash to their name, their score, and the tokens they had."""
    scene.queue_up("a", "b")
    scene.register()
    scene.take()
    scene.emit("b", num=4)
    scene.lapse()

    reaped = scene.reap()

    assert (reaped.num_requeued, reaped.num_dead, reaped.was_graced) == (2, 0, False)
    assert scene.waiting() == ["a", "b"]
    assert scene.record("b").crashes == 1
    assert scene.backlog()["0"] == 3 + 3 + 4
    assert scene.reap().num_requeued == 0
    check(scene)


def test_a_living_worker_is_left_alone(scene: Scene) -> None:
    """Only leases that ran out are reaped; renewing in time keeps everything."""
    scene.bring(S.RUNNING)
    scene.register("w2")
    scene.lapse("w2")

    assert scene.reap().num_requeued == 0

    assert scene.state() is S.RUNNING
    assert scene.renew("w1") is Verdict.OK
    assert scene.renew("w2") is Verdict.LOST
    check(scene)


def test_reaping_is_bounded_and_goes_on_next_time(scene: Scene) -> None:
    """The limit counts over workers; a worker disappears when nothing of it is left."""
    scene.queue_up("a", "b", "c", "d", "e")
    for worker, num in (("w1", 3), ("w2", 2)):
        scene.register(worker)
        scene.take(worker, max_requests=num)
        scene.lapse(worker)

    assert [scene.reap(limit=2).num_requeued for _ in range(4)] == [2, 2, 1, 0]

    assert scene.executor.run(scene.reads.incarnations()) == []
    check(scene)


def test_two_crashes_send_a_request_to_the_solo_queue(scene: Scene) -> None:
    """One crash may be anybody's fault; the second makes a suspect."""
    scene.queue_up("a")
    scene.register()
    scene.grant()
    scene.crash()
    assert (scene.waiting("0"), scene.waiting(SOLO_STAGE)) == (["a"], [])
    scene.grant()
    scene.crash()
    assert (scene.waiting("0"), scene.waiting(SOLO_STAGE)) == ([], ["a"])
    check(scene)


def test_a_suspect_is_taken_only_by_a_worker_that_holds_nothing(scene: Scene) -> None:
    """It would endanger its company."""
    scene.suspect("a")
    scene.queue_up("b")
    scene.grant()

    assert scene.take(stage=SOLO_STAGE).grants == ()

    scene.settle("b")
    assert scene.grant(stage=SOLO_STAGE).request_id == "a"
    check(scene)


def test_nothing_joins_a_suspect_while_it_runs(scene: Scene) -> None:
    """Neither from a queue nor a second suspect; afterwards the worker is free again."""
    scene.suspect("a", "b")
    scene.queue_up("c")
    assert [g.request_id for g in scene.take(stage=SOLO_STAGE).grants] == ["a"], "one at a time"

    assert scene.take().grants == ()
    assert scene.take(stage=SOLO_STAGE).grants == ()

    scene.settle("a", epoch=3)
    assert scene.grant().request_id == "c"
    check(scene)


@pytest.mark.parametrize("ending", ["settle", "release", "cancel", "expire"])
def test_a_worker_is_free_after_its_suspect_left_in_any_way(scene: Scene, ending: str) -> None:
    """The solo rule is bound to the lease, not to a flag that somebody must clear."""
    scene.suspect("a")
    scene.queue_up("b")
    scene.grant(stage=SOLO_STAGE)
    if ending == "settle":
        scene.settle(epoch=3)
    elif ending == "release":
        scene.release(epoch=3)
    elif ending == "cancel":
        scene.cancel()
    else:
        scene.overdue()
        scene.expire()

    assert scene.grant().request_id == "b"


@pytest.mark.parametrize("max_crashes", [1, 2, 3])
def test_only_dying_alone_often_enough_condemns(scene: Scene, max_crashes: int) -> None:
    """Two crashes in company, then `max_crashes` alone: dead, with a dead letter and an error."""
    scene.suspect("a")
    for turn in range(max_crashes):
        assert scene.state() is S.QUEUED
        scene.grant(stage=SOLO_STAGE)
        reaped = scene.crash(max_crashes=max_crashes)
        assert (reaped.num_requeued, reaped.num_dead) == ((1, 0) if turn < max_crashes - 1 else (0, 1))

    record = scene.record()
    assert record.state is S.DEAD
    assert record.error is not None
    assert f"the last {max_crashes} times alone" in record.error
    (letter,) = scene.executor.run(scene.reads.dead_letters(count=10))
    assert letter.request_id == "a"
    check(scene)


def test_company_of_a_poisonous_request_survives_it(scene: Scene) -> None:
    """Nine innocents die with it twice; each then passes alone, and only the culprit is condemned."""
    innocents = [f"i{n}" for n in range(9)]
    scene.suspect("poison", *innocents)
    for _ in range(40):
        taken = scene.take(stage=SOLO_STAGE)
        if not taken.grants:
            break
        (grant,) = taken.grants
        if grant.request_id == "poison":
            scene.crash()
        else:
            assert scene.settle(grant.request_id, epoch=grant.epoch, num=1) is Verdict.OK

    assert scene.state("poison") is S.DEAD
    assert all(scene.state(i) is S.DONE for i in innocents)
    assert scene.counts()["live"] == 0
    check(scene)


def test_giving_back_with_blame_counts_like_a_crash(scene: Scene) -> None:
    """The engine died and its worker lives: the same way to the solo queue, and to dead letters in the end."""
    scene.queue_up("a")
    scene.register()
    for epoch, stage in ((1, "0"), (2, "0"), (3, SOLO_STAGE), (4, SOLO_STAGE), (5, SOLO_STAGE)):
        assert scene.grant(stage=stage).epoch == epoch
        assert scene.release(epoch=epoch, blame=True, max_crashes=3) is Verdict.OK
        assert scene.release(epoch=epoch, blame=True, max_crashes=3) is Verdict.DUP
        assert scene.record().crashes == epoch
        check(scene)

    assert scene.state() is S.DEAD


def test_giving_back_without_blame_is_never_held_against_a_request(scene: Scene) -> None:
    """Twenty stops of its worker, alone or not."""
    scene.suspect("a")
    for epoch in range(3, 23):
        scene.grant(stage=SOLO_STAGE)
        scene.release(epoch=epoch)

    assert scene.record().crashes == 2
    assert scene.waiting(SOLO_STAGE) == ["a"]
    check(scene)


def test_a_hand_over_chooses_queue_and_score(scene: Scene) -> None:
    """Except for a suspect, who stays one."""
    scene.bring(S.RUNNING)
    scene.emit(num=5)
    scene.release(stage="2", score=77.5)
    assert scene.waiting("2") == ["a"]
    assert scene.grant(stage="2").score == 77.5
    assert scene.backlog() == {"0": 0, "2": 0}

    scene.release(epoch=2, blame=True)
    scene.grant(stage="2")
    scene.release(epoch=3, blame=True, stage="1")
    assert scene.waiting(SOLO_STAGE) == ["a"]
    check(scene)


def test_an_outage_gives_everybody_one_lease_of_grace(scene: Scene) -> None:
    """Nobody could renew while Redis was away: the first reaper takes nothing, also not from who is next."""
    scene.queue_up("a", "b")
    for worker in ("w1", "w2"):
        scene.register(worker)
        scene.grant(worker)
    scene.reap(gap_ms=1000)
    scene.lapse("w1")
    now_ms = scene.executor.run(scene.reads.server_time_ms())
    scene.raw.zadd(scene.keys.workers, {"w2": now_ms + 200})
    scene.raw.set(scene.keys.tick, now_ms - 30_000)

    reaped = scene.reap(gap_ms=1000, grace_ms=60_000)

    assert (reaped.num_requeued, reaped.was_graced) == (0, True)
    leases = dict(scene.executor.run(scene.reads.incarnations()))
    assert all(expiry >= now_ms + 60_000 for expiry in leases.values())
    assert scene.reap(gap_ms=1000).was_graced is False
    assert scene.state("a") is S.RUNNING
    check(scene)


def test_a_lease_longer_than_the_grace_is_not_cut(scene: Scene) -> None:
    """Workers may have other settings than the reaper."""
    scene.bring(S.RUNNING)
    scene.renew(lease_ms=500_000)
    before = scene.executor.run(scene.reads.incarnations())
    scene.raw.set(scene.keys.tick, 1)

    scene.reap(gap_ms=1000, grace_ms=5_000)

    assert scene.executor.run(scene.reads.incarnations()) == before


def test_slow_reapers_do_not_keep_the_dead_alive(scene: Scene) -> None:
    """Each call finds a gap; a worker that never renews has three graces, one that renews has more each time."""
    scene.queue_up("a", "b")
    for worker in ("dead", "alive"):
        scene.register(worker)
        scene.grant(worker)
    rounds = 0
    while scene.state("a") is S.RUNNING:
        scene.lapse("dead")
        scene.renew("alive")
        scene.lapse("alive")
        scene.raw.set(scene.keys.tick, 1)
        scene.reap(gap_ms=1000)
        rounds += 1
        assert rounds < 10

    assert rounds == 4
    assert scene.state("b") is S.RUNNING
    check(scene)


def test_the_first_reaper_of_all_gives_no_grace(scene: Scene) -> None:
    """No last call, no gap."""
    scene.bring(S.RUNNING)
    scene.lapse()

    reaped = scene.reap(gap_ms=1000)

    assert (reaped.num_requeued, reaped.was_graced) == (1, False)


def test_reapers_of_different_settings_share_one_tick(scene: Scene) -> None:
    """The strict one sees the calls of the lax one: a short gap limit alone is no reason for grace."""
    scene.bring(S.RUNNING)
    scene.reap(gap_ms=60_000)
    scene.lapse()

    assert scene.reap(gap_ms=1_000).num_requeued == 1


def test_a_worker_that_leaves_gives_back_what_it_holds_without_blame(scene: Scene) -> None:
    """Also what it never heard of, because the reply of its take was lost; its later writes are fenced."""
    scene.queue_up("a", "b")
    scene.register()
    scene.take()
    scene.emit("a", num=2)

    assert scene.retire() is Verdict.OK

    assert scene.waiting() == ["a", "b"]
    assert scene.record("a").crashes == 0
    assert scene.emit("a", offset=2) is Verdict.FENCED
    assert scene.renew() is Verdict.LOST
    assert scene.executor.run(scene.reads.incarnations()) == []
    check(scene)


def test_extending_a_lease_keeps_it_and_its_news(scene: Scene) -> None:
    """Only that of a registered worker; never shorter; what it told last stands, and grace is earned again."""
    assert scene.extend() is Verdict.LOST
    scene.register(load="told")
    (before,) = scene.executor.run(scene.reads.incarnations())

    assert scene.extend(lease_ms=1_000) is Verdict.OK
    assert scene.executor.run(scene.reads.incarnations()) == [before], "a lease is not cut short"
    scene.raw.hset(scene.keys.worker("w1"), "graced", 3)
    assert scene.extend(lease_ms=600_000) is Verdict.OK

    ((_, expires_ms),) = scene.executor.run(scene.reads.incarnations())
    assert expires_ms > before[1]
    assert scene.raw.hmget(scene.keys.worker("w1"), "load", "graced") == [b"told", None]
    scene.lapse()
    scene.reap()
    assert scene.extend() is Verdict.LOST
    check(scene)
