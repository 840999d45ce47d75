"""Holders: what workers tell of their caches, what is noted of an arrival, the head of a queue, takes by name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.models import RequestState
from l4queue.policy.admission import AdmissionBudget
from l4queue.policy.prefix_affinity import OwnChoice, QueuedPrompt
from l4queue.policy.prefix_blocks import BLOCK_TOKENS, KEY_BYTES, MOST_TOLD, block_keys
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol.calls import Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.holders import BLOCKS_TTL_MS, hold, look
from l4queue.protocol.records import BackgroundQuota
from tests.protocol.consistency import check
from tests.protocol.scene import Scene
from workers.loop.held_blocks import BlockNews, HeldBlocks

A, B, C = (bytes([n]) * 8 for n in (1, 2, 3))
ROOM = AdmissionBudget(
    num_requests=9, kv_tokens=1000, prefill_tokens=50, growth_tokens=1, is_idle=False, reason="room"
)


def tell(scene: Scene, worker: str, news: BlockNews) -> Verdict:
    """What a worker does with its news."""
    call = hold(scene.keys, worker, added=news.added, removed=news.removed, is_all=news.is_all)
    return scene.executor.run(call)


def tell_all(scene: Scene, worker: str, *keys: bytes) -> None:
    assert tell(scene, worker, BlockNews(added=keys, removed=(), is_all=True)) is Verdict.OK


def known(scene: Scene, worker: str = "w1") -> set[bytes]:
    return set(scene.raw.smembers(scene.keys.blocks(worker)))


def waiting(scene: Scene, limit: int = 9, overdue_ms: float = 60_000.0) -> list[QueuedPrompt]:
    return scene.executor.run(look(scene.keys, "0", limit=limit, overdue_ms=overdue_ms))


def test_a_worker_tells_what_it_holds(scene: Scene) -> None:
    """First all, then changes; all again replaces what was there. It is forgotten without news."""
    scene.register()
    tell_all(scene, "w1", A, B)
    assert tell(scene, "w1", BlockNews(added=(C,), removed=(A,), is_all=False)) is Verdict.OK
    assert known(scene) == {B, C}
    assert 0 < scene.raw.pttl(scene.keys.blocks("w1")) <= BLOCKS_TTL_MS
    many = [number.to_bytes(8, "big") for number in range(2500)]
    tell_all(scene, "w1", *many)
    assert known(scene) == set(many)
    tell_all(scene, "w1", A)
    assert known(scene) == {A}


def test_changes_of_what_nobody_knows_are_refused(scene: Scene) -> None:
    """After a restart of Redis, or for a new lease; without a lease nothing is noted."""
    news = BlockNews(added=(A,), removed=(), is_all=True)
    assert tell(scene, "w1", news) is Verdict.LOST
    scene.register()
    assert tell(scene, "w1", BlockNews(added=(A,), removed=(), is_all=False)) is Verdict.UNKNOWN
    assert known(scene) == set()


@pytest.mark.parametrize("is_reaped", [False, True])
def test_blocks_go_with_the_lease(scene: Scene, is_reaped: bool) -> None:
    scene.register()
    tell_all(scene, "w1", A)
    if is_reaped:
        scene.crash()
    else:
        scene.executor.run(scene.calls.retire("w1"))
    assert not scene.raw.exists(scene.keys.blocks("w1"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_arrivals_are_told_who_holds_how_much(executor: Executor, data: st.DataObject) -> None:
    """As by looking at every block of every worker, whatever they ran, with caches of any size."""
    scene = Scene(executor, "holders-any")
    scene.raw.flushall()
    texts = st.lists(st.sampled_from([1, 2]), min_size=0, max_size=6)
    workers = {}
    for name in ("w1", "w2", "w3"):
        scene.register(name)
        workers[name] = held = HeldBlocks(data.draw(st.integers(0, 12)))
        for _ in range(data.draw(st.integers(0, 3))):
            for text in data.draw(st.lists(texts, max_size=3)):
                held.use(block_keys([token for token in text for _ in range(BLOCK_TOKENS)]))
            news = held.news()
            if news is not None:
                assert tell(scene, name, news) is (
                    Verdict.OK if news.is_all or known(scene, name) else Verdict.UNKNOWN
                )
                if news.is_all or known(scene, name):
                    held.told(news)
                else:
                    held.forgotten()
        news = held.news()
        if news is not None:
            tell_all(scene, name, *held._blocks)
    prompt = [token for token in data.draw(texts) for _ in range(BLOCK_TOKENS)] + [7] * data.draw(
        st.integers(0, BLOCK_TOKENS - 1)
    )
    keys = block_keys(prompt)
    scene.submit(max_live_tokens=10**9)
    scene.route(token_ids=prompt or [7], blocks=keys)
    expected = {name: held.num_leading(keys) * BLOCK_TOKENS for name, held in workers.items()}
    (found,) = waiting(scene)
    assert found.held_tokens == {name: tokens for name, tokens in expected.items() if tokens}
    scene.close()


def test_an_arrival_is_told_who_holds_how_much(scene: Scene) -> None:
    """Not of a worker whose lease has run out, nor of what stands behind a block that a worker lacks."""
    keys = block_keys([7] * (5 * BLOCK_TOKENS))
    for worker, held, lease_ms in (("w1", keys[:2], 60_000), ("w2", [A, *keys[:4]], 60_000), ("w3", keys, -1000)):
        scene.register(worker, lease_ms=lease_ms)
        tell_all(scene, worker, *held)
    scene.submit()
    scene.route(blocks=keys)
    assert waiting(scene)[0].held_tokens == {"w1": 2 * BLOCK_TOKENS, "w2": 4 * BLOCK_TOKENS}


def test_what_a_worker_holds_is_no_prefill(scene: Scene) -> None:
    """The budget ends with what is to be computed: the last token always is."""
    scene.register()
    for name in "abcd":
        scene.submit(name)
        scene.route(name, token_ids=[7] * 40)
    named = [own("a", 40), own("b", 30), own("c", 1), own("d", 40)]
    assert [grant.request_id for grant in scene.take(budget=ROOM, named=named).grants] == ["a", "b", "c"]


def test_without_blocks_nothing_is_noted(scene: Scene) -> None:
    scene.register()
    tell_all(scene, "w1", A)
    scene.submit()
    scene.route()
    assert scene.raw.hget(scene.keys.request("a"), "held") is None
    assert waiting(scene)[0].held_tokens == {}


def test_the_head_of_a_queue_is_read_in_serving_order(scene: Scene) -> None:
    """Without the background; what nobody of ours wrote holds nothing. Reading changes nothing."""
    for name, score in (("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", BACKGROUND + 9e12)):
        scene.submit(name)
        scene.route(name, score=score, token_ids=[7] * 5)
    scene.raw.hset(scene.keys.request("b"), "held", '{"w1": 128, "w2": "x", "w3": -1}')
    scene.raw.hset(scene.keys.request("c"), "held", "[")
    before = scene.dump()
    found = waiting(scene)
    assert [one.request_id for one in found] == ["b", "c", "a"]
    assert [one.held_tokens for one in found] == [{"w1": 128}, {}, {}]
    assert {one.length_tokens for one in found} == {5}
    assert all(0 <= one.waited_ms < 60_000 for one in found)
    assert [one.request_id for one in waiting(scene, limit=2)] == ["b", "c"]
    assert scene.dump() == before


def test_a_background_request_that_is_overdue_is_looked_at_in_its_place(scene: Scene) -> None:
    """And taken by name like any other, whatever the quota of the background."""
    now_ms = scene.executor.run(scene.reads.server_time_ms())
    scene.register()
    for name, score in (
        ("a", now_ms - 9e6),
        ("b", BACKGROUND + now_ms - 8e6),
        ("c", now_ms - 7e6),
        ("d", BACKGROUND + now_ms),
    ):
        scene.submit(name)
        scene.route(name, score=score)
    assert [one.request_id for one in waiting(scene)] == ["a", "b", "c"]
    assert [one.request_id for one in waiting(scene, limit=2)] == ["a", "b"]
    hold_back = BackgroundQuota(for_ms=1e15, max_requests=0, overdue_ms=60_000.0)
    taken = scene.take(named=[own("b"), own("a")], hold=hold_back)
    assert [grant.request_id for grant in taken.grants] == ["b", "a"]


def own(request_id: str, held_tokens: int = 0) -> OwnChoice:
    return OwnChoice(request_id=request_id, held_tokens=held_tokens, reason="holds most of its prefix")


def test_named_requests_are_taken_in_the_order_of_their_names(scene: Scene) -> None:
    """Whatever stands before them; others' and unknown ones are left; the reason is kept."""
    scene.register()
    scene.register("w2")
    for number, name in enumerate("abcd"):
        scene.submit(name)
        scene.route(name, score=float(number), token_ids=[7] * 5)
    scene.take("w2", named=[own("b")])
    named = [own("d"), own("b"), own("nobody"), own("c")]
    taken = scene.take(nonce="n", named=named)
    assert [grant.request_id for grant in taken.grants] == ["d", "c"]
    assert scene.take(nonce="n", named=named) == taken
    assert scene.record("d").placed == "holds most of its prefix"
    assert scene.record("a").placed is None
    assert scene.record("a").state is RequestState.QUEUED
    check(scene)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=6),
    prefill_tokens=st.integers(1, 100),
    kv_tokens=st.integers(1, 200),
    is_idle=st.booleans(),
)
def test_named_requests_are_taken_by_the_rule_of_admission(
    executor: Executor, requests: list[tuple[int, int]], prefill_tokens: int, kv_tokens: int, is_idle: bool
) -> None:
    """What the worker holds of them is no prefill, but takes its room."""
    budget = AdmissionBudget(
        num_requests=4,
        kv_tokens=kv_tokens,
        prefill_tokens=prefill_tokens,
        growth_tokens=2,
        is_idle=is_idle,
        reason="room",
    )
    scene = Scene(executor, "named-any")
    scene.raw.flushall()
    scene.register()
    named, expected, left = [], [], budget
    for number, (length, held) in enumerate(requests):
        scene.submit(str(number), max_live_tokens=10**9)
        scene.route(str(number), token_ids=[7] * length)
        named.append(own(str(number), held))
    for one, (length, held) in zip(named, requests, strict=True):
        if left.refusal(length) is not None:
            break
        expected.append(one.request_id)
        left = left.after(length, prefill_tokens=max(1, length - held))
    assert [grant.request_id for grant in scene.take(budget=budget, named=named).grants] == expected
    scene.close()


@pytest.mark.parametrize("is_routed_with", [False, True])
@pytest.mark.parametrize("num_last", [0, 1])
def test_an_end_tells_the_blocks_of_its_prompt(scene: Scene, is_routed_with: bool, num_last: int) -> None:
    """Those of the dispatcher, else those of the worker; the record keeps neither."""
    scene.register()
    scene.submit()
    scene.route(blocks=[A, B] if is_routed_with else ())
    scene.grant()
    assert scene.settle(num=num_last, blocks=[C]) is Verdict.OK
    (found,) = scene.executor.run(scene.reads.finished(count=2))
    assert found.blocks == (A + B if is_routed_with else C)
    assert scene.raw.hget(scene.keys.request("a"), "blocks") is None
    check(scene)


def test_an_end_tells_no_blocks_that_nobody_told(scene: Scene) -> None:
    scene.bring(RequestState.RUNNING)
    scene.settle(num=1)
    ((_, values),) = scene.raw.xrange(scene.keys.finished)
    assert b"h" not in values


@pytest.mark.parametrize("is_routed_with", [False, True])
def test_an_end_tells_the_first_blocks_of_a_long_prompt(scene: Scene, is_routed_with: bool) -> None:
    """So 20,000 of them take 80 MB at most."""
    many = [number.to_bytes(KEY_BYTES, "big") for number in range(MOST_TOLD + 100)]
    scene.register()
    scene.submit()
    scene.route(blocks=many if is_routed_with else ())
    scene.grant()
    scene.settle(num=1, blocks=many)
    (found,) = scene.executor.run(scene.reads.finished(count=2))
    assert found.blocks == b"".join(many[:MOST_TOLD])
