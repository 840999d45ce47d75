"""Admission is bounded, counters return to zero, and nothing finished stays for ever."""

from __future__ import annotations

import numpy as np
import pytest

from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.keys import SOLO_STAGE
from tests.conftest import SEED
from tests.protocol.consistency import check
from tests.protocol.scene import PROMPT_TOKENS, Scene

S = RequestState


def test_the_backlog_is_bounded_in_tokens(scene: Scene) -> None:
    """Up to the bound exactly; beyond it FULL says how much is there and how fast it drains."""
    assert scene.submit("a", charge_tokens=60, max_live_tokens=100).verdict is Verdict.OK
    assert scene.submit("b", charge_tokens=40, max_live_tokens=100).verdict is Verdict.OK
    scene.raw.hset(scene.keys.counts, "drain_tokens_per_s", "12.5")
    before = scene.dump()

    reply = scene.submit("c", charge_tokens=1, max_live_tokens=100)

    assert (reply.verdict, reply.live_tokens, reply.drain_tokens_per_s) == (Verdict.FULL, 100, 12.5)
    assert scene.counts()["rejected"] == 1
    scene.raw.hdel(scene.keys.counts, "rejected")
    assert scene.dump() == before
    check(scene)


def test_the_backlog_is_bounded_in_bytes(scene: Scene) -> None:
    """Of what Redis uses for each, prompt and parameters included: what an end frees may be used again."""
    assert scene.submit("a", prompt=b"x" * 5000, body="{}").verdict is Verdict.OK
    one = scene.counts()["live_bytes"]
    assert 5500 < one < 8000
    bound = round(2.1 * one)
    used = scene.raw.memory_usage(scene.keys.request("a"), samples=0)  # and its places in inbox and counts
    assert used < one < 1.1 * used

    assert scene.submit("b", prompt=b"x" * 5000, body="{}", max_live_bytes=bound).verdict is Verdict.OK
    assert scene.submit("c", prompt=b"x" * 5000, body="{}", max_live_bytes=bound).verdict is Verdict.FULL
    scene.cancel("a")
    assert scene.submit("c", prompt=b"x" * 5000, body="{}", max_live_bytes=bound).verdict is Verdict.OK


def test_one_request_larger_than_the_bound_passes_when_nothing_else_is_there(scene: Scene) -> None:
    """It could never be accepted otherwise."""
    assert scene.submit("a", charge_tokens=500, max_live_tokens=100).verdict is Verdict.OK
    assert scene.submit("b", charge_tokens=1, max_live_tokens=100).verdict is Verdict.FULL
    scene.cancel("a")
    assert scene.submit("b", charge_tokens=1, max_live_tokens=100).verdict is Verdict.OK


def test_a_left_out_max_tokens_is_decided_by_the_dispatcher(scene: Scene) -> None:
    """It is told so; its body is the one that workers get, and admission counts what it says."""
    scene.submit("a", charge_tokens=10, body="{}", has_open_end=True)
    scene.submit("b", charge_tokens=10, body="{}")
    told = [scene.executor.run(scene.reads.body(name)) for name in ("a", "b")]
    assert [body is not None and body.has_open_end for body in told] == [True, False]

    body = '{"params":{"max_tokens":900}}'
    scene.route("a", max_tokens=900, charge_tokens=20, body=body)
    scene.route("b", max_tokens=8)
    check(scene)
    assert scene.counts()["live_tokens"] == 20 + PROMPT_TOKENS + 8
    scene.renew("w1", register=True)
    assert {grant.request_id: grant.body for grant in scene.take("w1").grants} == {"a": body.encode(), "b": b"{}"}


def test_a_full_backlog_still_answers_for_what_was_accepted(scene: Scene) -> None:
    """A client that repeats after a lost reply must not be told FULL."""
    scene.submit("a", charge_tokens=100, max_live_tokens=100)

    assert scene.submit("a", charge_tokens=100, max_live_tokens=100).verdict is Verdict.DUP


@pytest.mark.parametrize("state", list(S))
def test_the_same_id_is_the_same_request_for_as_long_as_its_record_lives(
    scene: Scene, state: RequestState
) -> None:
    """In any state: DUP with the same digest, CONFLICT with another; neither changes anything."""
    scene.bring(state)
    before = scene.dump()

    same = scene.submit()
    other = scene.submit(digest="different")

    assert (same.verdict, same.state) == (Verdict.DUP, state.value)
    assert (other.verdict, other.state) == (Verdict.CONFLICT, state.value)
    assert scene.dump() == before


@pytest.mark.parametrize(
    ("stored", "repeated", "verdict"),
    [
        (("ab", "c"), ("ba", "c"), Verdict.DUP),  # its keys in another order
        (("ab", "c"), ("ab", ""), Verdict.DUP),  # repeated by a client that knows no second digest
        (("ab", ""), ("ab", "c"), Verdict.DUP),  # stored by such a client
        (("ab", "c"), ("xy", "z"), Verdict.CONFLICT),
        (("ab", ""), ("ba", "c"), Verdict.CONFLICT),  # nobody can know
        (("ab", "c"), ("xy", ""), Verdict.CONFLICT),
    ],
)
def test_either_digest_makes_it_the_same_request(
    scene: Scene, stored: tuple[str, str], repeated: tuple[str, str], verdict: Verdict
) -> None:
    """As it was written, or with the order of its keys left out."""
    assert scene.submit(digest=stored[0], canonical=stored[1]).verdict is Verdict.OK
    before = scene.dump()
    assert scene.submit(digest=repeated[0], canonical=repeated[1]).verdict is verdict
    assert scene.dump() == before


def test_the_estimate_is_replaced_by_the_count(scene: Scene) -> None:
    """From submit to route the charge is an estimate; then it is prompt plus the most it may generate."""
    scene.submit(charge_tokens=999, max_live_tokens=1000)
    assert scene.counts()["live_tokens"] == 999
    scene.route(token_ids=[1] * 5, max_tokens=20)
    assert scene.counts()["live_tokens"] == 25
    scene.cancel()
    assert scene.counts()["live_tokens"] == 0


def test_a_cancelled_request_leaves_the_inbox(scene: Scene) -> None:
    """Submitting and cancelling for ever must not fill the inbox while no dispatcher is there."""
    for index in range(20):
        scene.submit(f"r{index}")
        scene.cancel(f"r{index}")
    scene.submit("late")
    scene.overdue("late")
    scene.expire()

    assert scene.raw.xlen(scene.keys.inbox) == 0
    check(scene)


def test_a_request_cancelled_under_a_dispatchers_hands_leaves_nothing_pending(scene: Scene) -> None:
    """It was read and not yet routed; the dispatcher's late call is harmless."""
    scene.submit()
    ((entry, _),) = scene.read_inbox()
    scene.cancel()

    assert scene.raw.xpending(scene.keys.inbox, "d")["pending"] == 0
    assert scene.route(entry=entry) is Verdict.DUP
    assert scene.refuse(entry=entry) is Verdict.DUP
    check(scene)


def test_two_dispatchers_may_route_the_same_request(scene: Scene) -> None:
    """One adopted what the other still works on: the first decides, whatever the second thinks."""
    scene.submit()
    ((entry, _),) = scene.read_inbox()

    assert scene.route(entry=entry, stage="1") is Verdict.OK
    assert scene.raw.xpending(scene.keys.inbox, "d")["pending"] == 0
    assert scene.route(entry=entry, stage="2") is Verdict.DUP
    assert scene.refuse(entry=entry) is Verdict.DUP

    assert (scene.waiting("1"), scene.waiting("2")) == (["a"], [])
    assert scene.raw.xpending(scene.keys.inbox, "d")["pending"] == 0
    check(scene)


def test_an_undecodable_entry_goes_to_the_dead_letters_once(scene: Scene) -> None:
    """With its bytes, capped; a repeat after a lost reply does not double it."""
    entry = scene.raw.xadd(scene.keys.inbox, {b"\xff": b"\xfe"}).decode()
    for _ in range(2):
        assert scene.refuse("?", entry=entry, raw=b"\xfe" * 100_000) is Verdict.DUP

    (letter,) = scene.executor.run(scene.reads.dead_letters(count=10))
    assert letter.raw == "\xfe" * 16_384
    assert scene.raw.xlen(scene.keys.inbox) == 0


def _random_step(scene: Scene, rng: np.random.Generator, num: int) -> None:
    request_id = f"r{rng.integers(num)}"
    worker = f"w{rng.integers(3)}"
    step = int(rng.integers(13))
    record = scene.executor.run(scene.reads.record(request_id))
    epoch, offset = (record.epoch, record.offset) if record else (0, 0)
    owner = scene.raw.hget(scene.keys.request(request_id), "owner") or b"w1"
    if step <= 1:
        scene.submit(request_id, charge_tokens=int(rng.integers(1, 50)), max_live_tokens=400)
    elif step <= 3:
        scene.route(request_id, stage=str(rng.integers(3)), token_ids=[1] * int(rng.integers(1, 9)))
    elif step <= 5:
        stage = SOLO_STAGE if rng.integers(3) == 0 else str(rng.integers(3))
        scene.register(worker)
        scene.take(worker, stage, max_requests=int(rng.integers(4)))
    elif step <= 7:
        scene.emit(request_id, owner.decode(), epoch, offset, int(rng.integers(1, 4)))
    elif step == 8:
        scene.settle(request_id, owner.decode(), epoch, offset, int(rng.integers(3)))
    elif step == 9:
        scene.release(request_id, owner.decode(), epoch, blame=bool(rng.integers(2)), stage=str(rng.integers(3)))
    elif step == 10:
        scene.crash(worker)
    elif step == 11:
        scene.migrate(str(rng.integers(3)), str(rng.integers(3)), limit=2)
    elif rng.integers(4) == 0:
        scene.cancel(request_id)
    elif rng.integers(4) == 0 and record is not None and record.state not in TERMINAL:
        scene.overdue(request_id)
        scene.expire()


@pytest.mark.parametrize("case", range(4))
def test_all_counters_return_to_zero(scene: Scene, case: int) -> None:
    """After any history, once everything has ended: nothing live, nothing waiting, no tokens, no bytes."""
    rng = np.random.default_rng([SEED, case])
    for _ in range(250):
        _random_step(scene, rng, 12)
    check(scene)
    for index in range(12):
        scene.cancel(f"r{index}")

    counts = scene.counts()
    assert {counts.get(name, 0) for name in ("live", "live_tokens", "live_bytes")} == {0}
    assert sum(counts.get(s.value, 0) for s in TERMINAL) == counts["submitted"]
    assert set(scene.backlog().values()) <= {0}
    assert scene.raw.xlen(scene.keys.inbox) == 0
    check(scene)


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_everything_finished_has_a_lifetime(scene: Scene, state: RequestState) -> None:
    """Record and output live for the result TTL, the mailbox for an hour; prompt and token ids go at once."""
    scene.bring(state)

    record = scene.raw.hgetall(scene.keys.request("a"))
    assert b"prompt" not in record
    assert b"ids" not in record
    assert 0 < scene.raw.pttl(scene.keys.request("a")) <= 60_000
    assert 0 < scene.raw.pttl(scene.keys.output("a")) <= 60_000
    assert 0 < scene.raw.pttl(scene.keys.mailbox("c1")) <= 3_600_000
    ((_, mail),) = scene.raw.xrange(scene.keys.mailbox("c1"))
    assert mail == {b"i": b"a", b"s": state.value.encode()}


def test_a_client_without_a_mailbox_gets_none(scene: Scene) -> None:
    """An empty client id makes no key."""
    scene.submit(client_id="")
    scene.cancel()

    assert scene.raw.exists(scene.keys.mailbox("")) == 0


def test_streams_that_nobody_may_read_are_capped(scene: Scene) -> None:
    """Wake-ups, control hints and plan history keep only their latest entries."""
    scene.submit()
    scene.route()
    scene.register()
    for version in range(600):
        scene.publish(version, version + 1)
    for epoch in range(1, 400):
        scene.grant()
        scene.release(epoch=epoch)
    for index in range(600):
        scene.submit(f"r{index}", max_live_tokens=10**9)
        scene.route(f"r{index}", stage="9", score=float(index))
    for batch in range(6):
        scene.take(stage="9", max_requests=100)
        for index in range(batch * 100, batch * 100 + 100):
            scene.cancel(f"r{index}")

    assert scene.raw.xlen(scene.keys.wake("0")) <= 64 + 100
    assert scene.raw.xlen(scene.keys.control("w1")) <= 256 + 100
    assert scene.raw.xlen(scene.keys.plans) <= 256 + 100
    assert scene.raw.pttl(scene.keys.control("w1")) > 0
    check(scene)


def test_a_running_request_that_ends_from_outside_is_hinted_to_its_owner(scene: Scene) -> None:
    """So that its worker aborts it in the engine before the next fenced write; its own settle needs no hint."""
    for request_id, end in (("a", scene.cancel), ("b", lambda i: (scene.overdue(i), scene.expire()))):
        scene.submit(request_id)
        scene.route(request_id)
        scene.register()
        scene.grant()
        end(request_id)
    scene.submit("c")
    scene.route("c")
    scene.grant()
    scene.settle("c")

    hints = [values[b"i"] for _, values in scene.raw.xrange(scene.keys.control("w1"))]
    assert hints == [b"a", b"b"]
