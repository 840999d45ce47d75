"""What has ended is stored in little memory, reads as before, and stays within a bound."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.packed import entries_of
from l4queue.protocol.records import Outcome, OutputEntry, TokenLogprobs
from l4queue.protocol.retention import Packed
from tests.protocol.consistency import check
from tests.protocol.earlier_scripts import earlier_script
from tests.protocol.scene import Scene

S = RequestState
BODY = '{"params":{"max_tokens":20}}'
WHY = '{"stage":1,"reason":"' + "w" * 200 + '"}'


def _run(scene: Scene, request_id: str, chunks: list[int], *, state: RequestState = S.DONE, **over: Any) -> None:
    """A request from the beginning to the end; its output comes in chunks of so many tokens."""
    assert scene.submit(request_id, **over).verdict is Verdict.OK
    scene.route(request_id, max_tokens=10**6, why=WHY)
    scene.register()
    scene.grant()
    offset, calls = 0, []
    for num in chunks:
        ids = scene.tokens(1, offset, num)
        text = "".join(f"{i}," for i in ids)
        emit = scene.calls.emit(request_id, incarnation="w1", epoch=1, offset=offset, token_ids=ids, text=text)
        calls.append(emit)
        offset += num
    assert set(scene.executor.run_many(calls)) <= {Verdict.OK}
    assert scene.settle(request_id, offset=offset, state=state) is Verdict.OK


def _everything(scene: Scene, request_id: str = "a") -> Any:
    record = scene.record(request_id)
    return record, scene.story(request_id), scene.output(request_id)


@pytest.mark.parametrize(
    "chunks",
    [[], [1], [1, 2, 3], [1] * 499, [1] * 500, [1] * 501, [2] * 1203, [300, 1]],
    ids=lambda chunks: f"{len(chunks)} of {sum(chunks)}",
)
def test_a_packed_request_reads_as_before(scene: Scene, chunks: list[int]) -> None:
    """Record, ledger, the reason of its routing, and every chunk of its output from every bound on."""
    _run(scene, "a", chunks, body=BODY, digest="d" * 64)
    before = _everything(scene)
    entries = before[2]

    while scene.pack(max_entries=1).has_more:
        pass

    assert _everything(scene) == before
    assert scene.raw.xlen(scene.keys.output("a")) == -(-len(chunks) // 500) + 1
    for index in (0, len(chunks) // 2, len(chunks) - 1, len(chunks)):
        after = sum(chunks[: max(0, index)])
        rest = [e for e in entries if e.upto > after or e.state is not None]
        assert scene.output(after=after) == rest
    check(scene, are_tokens_marked=sum(chunks) < 1000)


@settings(deadline=None, max_examples=40)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 200), st.text(max_size=40)), max_size=12),
    held=st.text(max_size=200),
    with_logprobs=st.booleans(),
    num_top=st.integers(0, 2),
)
def test_any_output_reads_as_before(
    executor: Executor, chunks: list[tuple[int, str]], held: str, with_logprobs: bool, num_top: int
) -> None:
    """Any text, any bounds, with and without logprobs; from any bound on."""
    scene = Scene(executor, "packed-any")
    for key in scene.raw.scan_iter(match=scene.keys.prefix + "*"):
        scene.raw.delete(key)
    scene.bring(S.RUNNING)
    offset, owner = 0, {"incarnation": "w1", "epoch": 1}
    for num, text in chunks:
        ids = list(range(offset, offset + num))
        rows = [TokenLogprobs(token_id=i, logprob=-i / 8, top=((i, -0.5),) * num_top) for i in ids]
        call = scene.calls.emit(
            "a", **owner, offset=offset, token_ids=ids, text=text, logprobs=rows if with_logprobs else ()
        )
        assert scene.executor.run(call) is Verdict.OK
        offset += num
    done = Outcome(state=S.DONE, finish_reason="stop", held_text=held)
    assert (
        scene.executor.run(scene.calls.settle("a", **owner, offset=offset, token_ids=[], text="", outcome=done))
        == "OK"
    )
    before = scene.output()

    assert scene.pack().num_packed == 1

    assert scene.output() == before
    assert scene.raw.xlen(scene.keys.output("a")) == (2 if chunks else 1)
    for entry in before:
        rest = [e for e in before if e.upto > entry.upto or e.state is not None]
        assert scene.output(after=entry.upto) == rest
    scene.close()


def test_a_reader_of_an_earlier_release_finds_a_packed_output(scene: Scene) -> None:
    """Without knowing bounds it reads one entry with all tokens and their text, and the end as it was."""
    _run(scene, "a", [2, 3, 1])
    before = scene.output()
    scene.pack()

    entries = [
        OutputEntry.parse(entry_id, values) for entry_id, values in scene.raw.xrange(scene.keys.output("a"))
    ]

    assert [(entry.upto, entry.state) for entry in entries] == [(6, None), (6, S.DONE)]
    assert entries[0].token_ids == tuple(t for e in before for t in e.token_ids)
    assert "".join(e.text for e in entries) == "".join(e.text for e in before)
    assert scene.raw.xrange(scene.keys.output("a"), "(6-0", "+")[0][1] == {b"e": b"done", b"x": b"end"}


def test_what_an_earlier_release_submitted_keeps_its_entries(scene: Scene) -> None:
    """Its client may go on from any of them; only the room that nobody needs any more is given back."""
    _run(scene, "a", [2, 3, 1], body=BODY)
    scene.raw.hdel(scene.keys.request("a"), "bounds")
    before = scene.raw.xrange(scene.keys.output("a"))

    assert scene.pack().num_packed == 1

    assert scene.raw.xrange(scene.keys.output("a")) == before
    assert scene.raw.memory_usage(scene.keys.output("a")) < 1500
    assert scene.raw.memory_usage(scene.keys.request("a")) < 1000


def test_outcomes_that_an_earlier_release_wrote_are_packed_too(scene: Scene) -> None:
    """Its workers settle with a script of their own, and their requests are in the same stream."""
    scene.submit(body=BODY)
    scene.route(why=WHY)
    scene.register()
    scene.grant()
    scene.emit(num=3)
    source = earlier_script("settle")
    args = ("a", "w1", 1, 3, 0, b"", "", "end", "done", "stop", "", "")
    keys = (scene.keys.request("a"), scene.keys.output("a"))
    assert scene.raw.eval(source, 2, *keys, *args) == b"OK"
    before = _everything(scene)

    assert scene.pack().num_packed == 1

    assert _everything(scene) == before
    assert scene.raw.xlen(scene.keys.output("a")) == 2


def test_what_has_just_ended_is_left_alone(scene: Scene) -> None:
    """Readers of an earlier release that are in the middle of it get the rest as it was written."""
    _run(scene, "a", [2, 2])

    assert scene.pack(min_age_ms=600_000).num_packed == 0

    assert scene.raw.xlen(scene.keys.output("a")) == 3


def test_each_is_packed_once_and_what_is_live_never(scene: Scene) -> None:
    """Also when one that has ended was deleted by its client, and when the place in the stream is lost."""
    for request_id in "abc":
        _run(scene, request_id, [2])
    scene.submit("live")
    assert scene.executor.run(scene.keeping.discard(["b"])) == 1

    assert scene.pack(max_requests=2) == Packed(num_packed=2, has_more=True)
    assert scene.pack(max_requests=2) == Packed(num_packed=1, has_more=False)
    before = scene.dump()
    scene.raw.delete(scene.keys.packed)
    scene.pack()
    assert scene.dump() == before
    assert scene.state("live") is S.SUBMITTED


@pytest.mark.parametrize("state", [S.DONE, S.FAILED, S.CANCELLED, S.EXPIRED, S.DEAD])
def test_every_outcome_is_packed_and_keeps_its_lifetime(scene: Scene, state: RequestState) -> None:
    """Record and output live as long as they would have."""
    scene.bring(state)
    scene.raw.pexpire(scene.keys.request("a"), 50_000)
    scene.raw.pexpire(scene.keys.output("a"), 40_000)
    before = scene.record(), scene.output()

    assert scene.pack().num_packed == 1

    assert (scene.record(), scene.output()) == before
    assert 10_000 < scene.raw.pttl(scene.keys.request("a")) <= 50_000
    assert 10_000 < scene.raw.pttl(scene.keys.output("a")) <= 40_000
    assert scene.executor.run(scene.calls.cancel("a", reason="late"))[0] is Verdict.IS
    assert scene.submit().verdict is Verdict.DUP
    check(scene)


def test_a_settle_repeated_after_packing_is_still_known(scene: Scene) -> None:
    """Its reply may have been lost for long."""
    _run(scene, "a", [2])
    scene.pack()

    assert scene.settle(offset=2) is Verdict.DUP
    assert scene.emit(offset=2) is Verdict.FENCED


def test_an_entry_whose_bounds_are_wrong_is_refused() -> None:
    """Instead of being shown in pieces that never were."""
    for bounds in (b"\x01\x01", b"\x01", b"\x01\x81", b"\x02\x02"):
        with pytest.raises(ValueError, match=r"bounds|number|shorter"):
            entries_of(b"1-0", {b"t": b"\x01\0\0\0", b"x": b"ab", b"c": bounds})


def test_what_nobody_of_ours_wrote_is_no_obstacle(scene: Scene) -> None:
    """Keys of other types, entries that tell of nothing, a time to come: the others are packed all the same."""
    for request_id in "abcde":
        _run(scene, request_id, [2, 1])
    scene.raw.delete(scene.keys.request("a"), scene.keys.output("b"))
    scene.raw.set(scene.keys.request("a"), "foreign")
    scene.raw.set(scene.keys.output("b"), "foreign")
    scene.raw.delete(scene.keys.output("c"))
    for entry_id, fields in (("2-0", {"t": b"123"}), ("7-0", {"x": b"?"}), ("9-1", {"e": b"done", "x": b""})):
        scene.raw.xadd(scene.keys.output("c"), fields, id=entry_id)
    scene.raw.pexpire(scene.keys.output("c"), 60_000)
    scene.raw.xadd(scene.keys.finished, {"q": "?"})
    _run(scene, "f", [2])

    scene.raw.xadd(scene.keys.finished, {"i": "?"}, id="9999999999999-0")
    _run(scene, "g", [2])

    assert scene.pack(min_age_ms=0).num_packed == 9
    scene.raw.zadd(scene.keys.results, {"no bytes": 0, "a 5": 0, "?": 0})
    scene.evict(max_bytes=1)

    assert scene.raw.get(f"{scene.keys.prefix}foreign:req:a") == b"foreign"
    assert scene.raw.zcard(scene.keys.results) == 0
    assert scene.raw.exists(scene.keys.request("d"), scene.keys.request("f")) == 0


def test_output_that_does_not_fit_is_left_as_it_is(scene: Scene) -> None:
    """Readers leave out what they cannot read of it, and would not know what of it is right once it is joined."""
    _run(scene, "a", [2, 1])
    scene.raw.delete(scene.keys.output("a"))
    for entry_id, fields in (("2-0", {"t": b"12345678"}), ("7-0", {"t": b"1234"}), ("9-1", {"e": b"done"})):
        scene.raw.xadd(scene.keys.output("a"), fields, id=entry_id)
    scene.raw.pexpire(scene.keys.output("a"), 60_000)
    before = scene.raw.xrange(scene.keys.output("a"))

    assert scene.pack().num_packed == 1

    assert scene.raw.xrange(scene.keys.output("a")) == before


# the bound ------------------------------------------------------------------------------------------


def _kept(scene: Scene, *ids: str, **over: Any) -> int:
    """Run and pack these; bytes of each."""
    for request_id in ids:
        _run(scene, request_id, [2], **over)
    scene.pack()
    return scene.counts()["result_bytes"] // len(ids)


def test_beyond_the_bound_the_oldest_results_go_early(scene: Scene) -> None:
    """Only as many as it takes; nothing stays of them, and it is counted."""
    one = _kept(scene, *"abcd")
    for index, request_id in enumerate("abcd"):  # in this order they would expire, some time from now
        scene.raw.zadd(scene.keys.results, {_member(scene, request_id): 10**14 + index})

    evicted = scene.evict(max_bytes=2 * one + 50)

    assert (evicted.num_dropped, evicted.num_forgotten) == (2, 0)
    assert evicted.kept_bytes <= 2 * one + 50
    assert [scene.raw.exists(scene.keys.request(i), scene.keys.output(i)) for i in "abcd"] == [0, 0, 2, 2]
    assert scene.counts()["results_dropped"] == 2
    assert scene.evict(max_bytes=2 * one + 50).num_dropped == 0


def _read(scene: Scene, *ids: str) -> int:
    return scene.executor.run(scene.keeping.mark_read(ids))


def test_results_that_were_read_go_before_others(scene: Scene) -> None:
    """Read before or after they are packed, and though they would expire last; a repeat notes nothing."""
    _run(scene, "d", [2])
    assert _read(scene, "d", "nobody", "d") == 1
    one = _kept(scene, *"abc")
    for index, request_id in enumerate("abcd"):
        scene.raw.zadd(scene.keys.results, {_member(scene, request_id): 10**14 + index})
    assert (_read(scene, "c"), _read(scene, "c", "d")) == (1, 0)

    assert scene.evict(max_bytes=2 * one + 50).num_dropped == 2

    assert [scene.raw.exists(scene.keys.request(i), scene.keys.output(i)) for i in "abcd"] == [2, 2, 0, 0]
    assert scene.raw.zcard(scene.keys.read) == 0
    assert scene.evict(max_bytes=one + 50).num_dropped == 1  # after them the oldest
    assert scene.raw.exists(scene.keys.request("a")) == 0


def test_what_was_read_and_expires_leaves_no_mark(scene: Scene) -> None:
    """Nor does a foreign member stop the others."""
    _kept(scene, *"ab")
    _read(scene, "a", "b")
    scene.raw.zadd(scene.keys.read, {"nobody's": 1, "c 5": 2})
    scene.raw.zadd(scene.keys.results, {_member(scene, "a"): 1})

    assert scene.evict().num_dropped == 0
    assert scene.raw.zrange(scene.keys.read, 0, -1) == [b"nobody's", b"c 5", _member(scene, "b")]
    assert scene.evict(max_bytes=1).num_dropped == 1
    assert scene.raw.zcard(scene.keys.read) == 0


def test_a_running_request_is_not_noted_as_read(scene: Scene) -> None:
    """It has no result yet."""
    scene.submit("a")
    assert _read(scene, "a") == 0


def _member(scene: Scene, request_id: str) -> bytes:
    for member in scene.raw.zrange(scene.keys.results, 0, -1):
        if member.rpartition(b" ")[0] == request_id.encode():
            return bytes(member)
    raise AssertionError(request_id)


def test_a_key_stays_known_when_its_result_goes_early(scene: Scene) -> None:
    """Its outcome, too. Such keys go last, and only then."""
    keyed = "k" + "1" * 31
    one = _kept(scene, keyed, "b", digest="x", key_ttl_ms=60_000, body=BODY)

    assert scene.evict(max_bytes=one).num_dropped == 2

    record = scene.record(keyed)
    assert (record.state, record.offset, record.dropped_ms is not None) == (S.DONE, 2, True)
    assert scene.output(keyed) == []
    reply = scene.submit(keyed, digest="x", key_ttl_ms=60_000)
    assert (reply.verdict, reply.state, reply.request_id) == (Verdict.DUP, "done", keyed)
    assert 0 < scene.counts()["result_bytes"] < 2 * one
    assert scene.evict(max_bytes=1).num_forgotten == 2
    assert scene.raw.exists(scene.keys.request(keyed)) == 0
    assert scene.counts()["result_bytes"] == 0


def test_what_has_expired_is_no_longer_counted(scene: Scene) -> None:
    """Results by their own time, and keys that outlive their results by theirs."""
    keyed = "k" + "2" * 31
    _kept(scene, "a")
    _kept(scene, keyed, digest="x", key_ttl_ms=600_000)
    for request_id in ("a", keyed):
        scene.raw.delete(scene.keys.output(request_id))
        scene.raw.zadd(scene.keys.results, {_member(scene, request_id): 1})
    scene.raw.delete(scene.keys.request("a"))

    assert scene.evict().num_dropped == 0

    assert scene.state(keyed) is S.DONE
    ((member, until_ms),) = scene.raw.zrange(scene.keys.keyed, 0, -1, withscores=True)
    assert scene.counts()["result_bytes"] == int(member.rpartition(b" ")[2])
    assert scene.executor.run(scene.reads.server_time_ms()) < until_ms
    scene.raw.zadd(scene.keys.keyed, {member: 1})
    scene.evict()
    assert scene.counts()["result_bytes"] == 0
    assert scene.raw.zcard(scene.keys.results) + scene.raw.zcard(scene.keys.keyed) == 0


def test_a_result_that_its_client_deletes_is_no_longer_counted(scene: Scene) -> None:
    """Packed or not; what is live is not deleted."""
    _kept(scene, "a")
    _run(scene, "b", [1])
    scene.submit("live")

    discard = scene.keeping.discard(["a", "live", "b", "none"])
    assert [scene.executor.run(discard), scene.executor.run(discard)] == [2, 0]

    assert scene.counts()["result_bytes"] == 0
    assert scene.raw.exists(scene.keys.request("a"), scene.keys.output("b")) == 0
    assert scene.state("live") is S.SUBMITTED
