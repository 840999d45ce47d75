"""What is bounded stays bounded, what is in ms is in ms, and what is cleared is cleared from the group as well."""

from __future__ import annotations

from typing import Any

import pytest

from l4queue import Client, Settings
from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from tests.protocol.scene import Scene

SLACK = 128
"""A stream is cut by whole nodes of 100 entries."""
_FILL = "for i = 1, ARGV[1] do redis.call('XADD', KEYS[1], '*', 'i', 'x') end"
STREAMS = {
    "finished": (20_000, lambda s: s.keys.finished),
    "dead": (10_000, lambda s: s.keys.dead),
    "mail": (20_000, lambda s: s.keys.mailbox("c1")),
    "wake": (64, lambda s: s.keys.wake("0")),
    "control": (256, lambda s: s.keys.control("w1")),
    "plans": (256, lambda s: s.keys.plans),
}


def _write_to_all(scene: Scene) -> None:
    """One entry to each of them."""
    scene.register()
    scene.submit()
    scene.route()
    scene.grant()
    scene.executor.run(scene.calls.ask("w1", message="{}"))
    scene.executor.run(scene.calls.publish(expected_version=0, version=1, body="{}"))
    scene.submit("b")
    scene.refuse("b", raw=b"its bytes")


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_is_full_stays_at_its_bound(scene: Scene, name: str) -> None:
    """It has its latest entries, whatever was there before."""
    bound, key_of = STREAMS[name]
    key = key_of(scene)
    scene.raw.eval(_FILL, 1, key, bound + 3 * SLACK)

    _write_to_all(scene)

    assert bound <= scene.raw.xlen(key) <= bound + SLACK


@pytest.mark.parametrize("has_record", [True, False])
@pytest.mark.parametrize("raw", [b"", b"its bytes"])
def test_a_refused_entry_is_pending_for_nobody(scene: Scene, raw: bytes, has_record: bool) -> None:
    """Else its dispatcher would have it for ever, and the next one adopt it."""
    scene.submit()
    entries = scene.read_inbox()
    if not has_record:
        scene.raw.delete(scene.keys.request("a"))
    scene.refuse(raw=raw)

    assert len(entries) == 1
    assert scene.raw.xlen(scene.keys.inbox) == 0
    assert scene.raw.xpending(scene.keys.inbox, "d")["pending"] == 0


def test_a_routed_entry_is_pending_for_nobody(scene: Scene) -> None:
    """The same where all went well, and where it was cancelled meanwhile."""
    scene.submit()
    scene.submit("b")
    scene.read_inbox()
    scene.cancel("b")
    scene.route()

    assert scene.raw.xpending(scene.keys.inbox, "d")["pending"] == 0


def test_a_deadline_is_so_many_ms_after_acceptance(scene: Scene) -> None:
    """In the record and in the set that `expire` reads."""
    reply = scene.submit(deadline_ms=5_000)
    record = scene.record()

    assert record.submitted_ms == reply.at_ms
    assert record.deadline_ms == record.submitted_ms + 5_000
    assert scene.raw.zscore(scene.keys.deadlines, "a") == record.deadline_ms


def test_seconds_of_a_client_are_ms_in_redis(scene: Scene, redis_url: str, namespace: str) -> None:
    """Its deadline and the life of its result."""
    settings = Settings(redis_url=redis_url, namespace=namespace, result_ttl_s=90.0, _env_file=None)  # type: ignore[call-arg]
    with Client(settings=settings) as client:
        handle = client.enqueue("hello", max_tokens=1, deadline_s=7.5)
        record = handle.status()
        key = scene.keys.request(handle.id)
        assert record.deadline_at_s is not None
        assert round(record.deadline_at_s - record.submitted_at_s, 3) == 7.5
        assert scene.raw.hget(key, "ttl_ms") == b"90000"
        assert handle.cancel()
    assert 60_000 < scene.raw.pttl(key) <= 90_000


def test_a_lease_is_so_many_ms_from_now(scene: Scene) -> None:
    """By the clock of the server."""
    before_ms = scene.executor.run(scene.reads.server_time_ms())
    scene.register(lease_ms=5_000)
    after_ms = scene.executor.run(scene.reads.server_time_ms())
    ((_, expires_ms),) = scene.executor.run(scene.reads.incarnations())

    assert before_ms + 5_000 <= expires_ms <= after_ms + 5_000


def _foreign_record(scene: Scene, **fields: Any) -> None:
    scene.submit()
    scene.route()
    scene.raw.hset(scene.keys.request("a"), mapping=fields)


@pytest.mark.parametrize("field", ["offset", "epoch", "prompt_tokens", "score", "submitted_ms", "charge_tokens"])
def test_a_queued_record_that_cannot_be_read_is_failed_with_its_bytes(scene: Scene, field: str) -> None:
    """By `take`, which serves the next one in the same call."""
    _foreign_record(scene, **{field: "abc"})
    scene.submit("b")
    scene.route("b", score=2.0)
    scene.register()

    assert [grant.request_id for grant in scene.take().grants] == ["b"]
    assert scene.raw.hget(scene.keys.request("a"), "state") == b"failed"
    ((_, letter),) = scene.raw.xrange(scene.keys.dead)
    assert letter[b"i"] == b"a"
    assert f"{field}=abc".encode() in letter[b"bytes"]
    assert scene.counts()["live"] == 1


@pytest.mark.parametrize(
    "mark", ["9999999999999999-0", "9" * 30 + "-0", "18446744073709551615-18446744073709551615", "abc", ""]
)
def test_a_mark_that_is_not_ours_stops_no_packing(scene: Scene, mark: str) -> None:
    """Nor does that of a clock that was ahead, once `finished` has begun anew."""
    scene.bring(RequestState.DONE)
    scene.raw.set(scene.keys.prefix + "packed", mark)

    assert [scene.pack().num_packed for _ in range(2)] == [1, 0]
    assert scene.counts()["result_bytes"] > 0


def test_a_live_request_among_kept_results_is_not_evicted(scene: Scene) -> None:
    """Somebody else wrote that it had ended: neither its record nor its output goes."""
    scene.bring(RequestState.RUNNING)
    scene.emit()
    for key in ("results", "keyed"):
        scene.raw.zadd(scene.keys.prefix + key, {"a 5": 1.0, "a 6": 9e15})
    scene.raw.hset(scene.keys.counts, "result_bytes", 10**6)

    scene.evict(max_bytes=0)

    assert scene.state() is RequestState.RUNNING
    assert scene.settle(offset=2) is Verdict.OK
    assert scene.shown() == [tuple(scene.tokens(1, 0, 2)), ()]
    assert scene.counts()["live"] == 0


@pytest.mark.parametrize("field", ["crashes", "prompt_tokens", "offset"])
def test_a_worker_that_comes_back_ends_a_record_that_cannot_be_read(scene: Scene, field: str) -> None:
    """And takes the blame from the others."""
    scene.register()
    for request_id in ("a", "b"):
        scene.submit(request_id)
        scene.route(request_id)
    scene.take()
    scene.crash()
    scene.raw.hset(scene.keys.request("a"), field, "abc")

    assert scene.pardon() == Verdict.OK
    assert scene.raw.hget(scene.keys.request("a"), "state") == b"failed"
    assert scene.record("b").crashes == 0


@pytest.mark.parametrize("field", ["state", "offset"])
@pytest.mark.parametrize("value", ["abc", b"\xff", "1e400"])
def test_one_record_that_cannot_be_read_hides_no_other_from_its_follower(
    scene: Scene, field: str, value: str | bytes
) -> None:
    """A state that nobody knows is none; a number that nobody can read tells of no tokens."""
    scene.bring(RequestState.QUEUED)
    scene.bring(RequestState.QUEUED, "b")
    scene.raw.hset(scene.keys.request("a"), field, value)

    call = scene.calls.follow("c1", followed=["a", "b"], looked_at=[], ttl_ms=1000)
    assert scene.executor.run(call).places == (
        (None if field == "state" else RequestState.QUEUED, 0),
        (RequestState.QUEUED, 0),
    )


@pytest.mark.parametrize("score", ["0x10", " 5", "5 ", "1e", "nan", "1_0"])
def test_a_place_in_the_order_that_only_some_can_read_ends_its_request(scene: Scene, score: str) -> None:
    """Lua reads more than Redis and workers do: neither taking nor giving back may fail for all the others."""
    for request_id in ("a", "b", "c"):
        scene.submit(request_id)
        scene.route(request_id)
    scene.register()
    scene.grant()
    for request_id in ("a", "b"):
        scene.raw.hset(scene.keys.request(request_id), "score", score)

    assert [grant.request_id for grant in scene.take().grants] == ["c"]
    assert scene.release("a") is Verdict.OK
    assert [scene.state(request_id) for request_id in ("a", "b")] == [RequestState.FAILED] * 2
    assert scene.counts()["live"] == 1


def test_a_cancelled_request_whose_state_nobody_knows_is_left_alone(scene: Scene) -> None:
    """Its client hears that it is not live."""
    scene.submit()
    scene.raw.hset(scene.keys.request("a"), "state", b"\xff\xfe")

    assert scene.cancel()[0] is Verdict.IS


def test_a_running_record_that_cannot_be_read_is_failed_by_its_next_write(scene: Scene) -> None:
    """Its worker is told that it is no longer the owner."""
    for request_id, act in (("a", "emit"), ("b", "settle"), ("c", "release")):
        scene.submit(request_id)
        scene.route(request_id)
        scene.register()
        scene.grant()
        scene.raw.hset(scene.keys.request(request_id), "offset", "abc")
        verdict = getattr(scene, act)(request_id)
        assert verdict in ("FENCED", "OK")
        assert scene.raw.hget(scene.keys.request(request_id), "state") == b"failed"
    assert scene.counts()["live"] == 0
    assert len(scene.raw.xrange(scene.keys.dead)) == 3


def test_a_counter_that_is_no_number_begins_anew(scene: Scene) -> None:
    """What it was is a dead letter."""
    scene.raw.hset(scene.keys.counts, mapping={"live": "abc", "submitted": b"\xff"})
    scene.submit()

    assert scene.counts()["live"] == scene.counts()["submitted"] == 1
    assert {letter[b"bytes"] for _, letter in scene.raw.xrange(scene.keys.dead)} == {b"abc", b"\xff"}


def test_a_counter_that_can_count_no_further_begins_anew(scene: Scene) -> None:
    """Nobody is refused for it, and no script stops half-way."""
    most, least = 2**63 - 1, -(2**63)
    scene.raw.hset(scene.keys.counts, mapping={"submitted": most, "done": most, "output_tokens": most})
    scene.raw.hset(scene.keys.counts, "live_bytes", least)
    scene.raw.hset(scene.keys.hist, mapping={"a:2": most, "p:2": most})
    scene.bring(RequestState.DONE)

    counts = scene.counts()
    assert (counts["submitted"], counts["done"], counts["output_tokens"], counts["live"]) == (1, 1, 1, 0)
    assert len(scene.raw.xrange(scene.keys.finished)) == 1
    assert {letter[b"bytes"] for _, letter in scene.raw.xrange(scene.keys.dead)} >= {b"%d" % most}


@pytest.mark.parametrize("value", ["abc", "", "nan", "inf", "-1", "{}", b"\xff\x00"])
def test_numbers_that_nobody_can_read_stop_no_reaper(scene: Scene, value: str | bytes) -> None:
    """Terms of leases that lie far ahead, and times at which requests last came to a stage."""
    scene.bring(RequestState.RUNNING)
    scene.register("w2")
    scene.raw.hset(scene.keys.worker("w2"), "lease_ms", value)
    scene.raw.zadd(scene.keys.workers, {"w2": 9e15})
    scene.raw.hset(scene.keys.foreground, "1", value)
    scene.lapse()

    assert scene.reap().num_requeued == 1
    assert scene.raw.zscore(scene.keys.workers, "w2") < 9e15
    assert scene.raw.hkeys(scene.keys.foreground) == [b"0"]


def test_kept_results_of_impossible_sizes_stop_no_eviction(scene: Scene) -> None:
    """They go, and what is counted stays."""
    scene.bring(RequestState.DONE)
    scene.pack()
    kept = scene.counts()["result_bytes"]
    for key in ("results", "keyed"):
        scene.raw.zadd(scene.keys.prefix + key, {"x " + "9" * 25: 1.0, "y -5": 1.0, "z": 1.0, b"\xff \xfe": 1.0})

    assert scene.evict().kept_bytes == kept
    assert scene.raw.zcard(scene.keys.prefix + "keyed") == 0
    assert scene.raw.zcard(scene.keys.prefix + "results") == 1


def test_what_a_reader_cannot_read_is_buried_once(scene: Scene) -> None:
    """However many readers find it, with its bytes, and counted."""
    from l4queue.protocol.foreign import Finding, burial

    found = Finding(key=scene.keys.plan, why="no JSON", raw=b"nonsense")
    call = burial(found)
    assert call is not None
    assert [scene.executor.run(call) for _ in range(3)] == [1, 0, 0]
    ((_, letter),) = scene.raw.xrange(scene.keys.dead)
    assert (letter[b"i"], letter[b"why"], letter[b"bytes"]) == (b"plan", b"no JSON", b"nonsense")
    assert scene.counts()["unreadable"] == 1


@pytest.mark.parametrize("name", STREAMS)
def test_a_key_of_another_type_is_set_aside_by_the_script_that_meets_it(scene: Scene, name: str) -> None:
    """For a week, and its bytes are a dead letter; the script does its work."""
    key = STREAMS[name][1](scene)
    scene.raw.set(key, "somebody else's")

    _write_to_all(scene)

    assert scene.raw.type(key) == b"stream"
    aside = scene.keys.prefix + "foreign:" + key.removeprefix(scene.keys.prefix)
    assert scene.raw.get(aside) == b"somebody else's"
    assert 0 < scene.raw.pttl(aside) <= 7 * 24 * 3600 * 1000
    assert any(letter.get(b"bytes") == b"somebody else's" for _, letter in scene.raw.xrange(scene.keys.dead))
