"""Taking work: serving order, room, replay of a lost reply, stale entries, lapsed leases."""

from __future__ import annotations

import numpy as np
import pytest

from l4queue.models import RequestState
from l4queue.policy.room import Room, Waiting, choose
from l4queue.protocol.calls import Verdict
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
    scene.take(nonce="y", max_requests=0)

    assert [g.request_id for g in scene.take(nonce="x", max_requests=1).grants] == ["b"], "a newer nonce forgets"
    assert [g.request_id for g in scene.take(nonce="x", max_requests=1).grants] == ["b"]
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
    """The script and `policy.room.choose` agree on random queues and rooms: simulator and live system are one."""
    rng = np.random.default_rng([SEED, case])
    for turn in range(12):
        stage = f"{case * 100 + turn}"
        worker = f"w{turn}"
        scene.register(worker)
        waiting = []
        for i in range(int(rng.integers(0, 7))):
            request_id, tokens = f"{turn}-{i}", int(rng.integers(1, 9))
            scene.submit(request_id, max_live_tokens=10**9)
            scene.route(request_id, stage=stage, score=float(i), token_ids=[1] * tokens)
            waiting.append(Waiting(request_id=request_id, length_tokens=tokens))
        room = Room(
            num_requests=int(rng.integers(0, 6)),
            kv_tokens=int(rng.integers(0, 30)),
            prefill_tokens=int(rng.integers(0, 15)),
            growth_tokens=int(rng.integers(0, 4)),
            is_idle=bool(rng.integers(2)),
            reason="any",
            longest_tokens=int(rng.integers(2, 12)),
        )
        expected = [w.request_id for w in waiting[: choose(room, waiting).num_requests]]

        taken = scene.take(
            worker,
            stage,
            max_requests=room.num_requests,
            room_tokens=room.kv_tokens,
            reserve_tokens=room.growth_tokens,
            prefill_tokens=room.prefill_tokens,
            is_idle=room.is_idle,
            longest_tokens=room.longest_tokens,
        )

        assert [g.request_id for g in taken.grants] == expected, room
    check(scene)
