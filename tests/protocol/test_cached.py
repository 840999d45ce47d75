"""Cached prompt tokens: told once with the first tokens or the end, by the lease that began the request."""

from __future__ import annotations

from typing import Any

import pytest

from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.records import CachedPrompt, NewsEntry, Outcome
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState
CACHED = CachedPrompt(found_tokens=64, made_tokens=32)


def emit(scene: Scene, offset: int, cached: CachedPrompt | None, **lease: Any) -> Verdict:
    """One token more."""
    named = {"incarnation": "w1", "epoch": 1, **lease}
    call = scene.calls.emit(
        "a", offset=offset, token_ids=scene.tokens(1, offset, 1), text="x", cached=cached, **named
    )
    return scene.executor.run(call)


def settle(scene: Scene, offset: int, cached: CachedPrompt | None, *, num: int = 0) -> Verdict:
    """The end, with the last tokens."""
    outcome = Outcome(state=S.DONE, finish_reason="length")
    call = scene.calls.settle(
        "a",
        incarnation="w1",
        epoch=1,
        offset=offset,
        token_ids=scene.tokens(1, offset, num),
        text="x" * num,
        outcome=outcome,
        cached=cached,
    )
    return scene.executor.run(call)


def told(scene: Scene) -> list[CachedPrompt | None]:
    """What the entries of the output tell."""
    return [entry.cached for entry in scene.output()]


def test_the_first_tokens_tell_it(scene: Scene) -> None:
    """Record, output, news and the stream of outcomes have it, packed or not; followers hear it once."""
    scene.bring(S.RUNNING)
    scene.executor.run(scene.calls.follow("n1", followed=["a"], ttl_ms=60_000))
    emit(scene, 0, CACHED)
    emit(scene, 1, None)
    settle(scene, 2, None, num=1)

    assert scene.record().cached_tokens == 64
    assert told(scene) == [CACHED, None, None, None]
    news = [NewsEntry.parse(values) for _, values in scene.raw.xrange(scene.keys.news("n1"))]
    assert [one.entry.cached for one in news if one and one.entry] == [CACHED, None, None, None]
    assert scene.executor.run(scene.reads.finished(count=1))[0].cached_tokens == 64
    before = scene.output()
    scene.pack()
    assert scene.output() == before
    assert scene.record().cached_tokens == 64


@pytest.mark.parametrize("num", [0, 1])
def test_an_engine_may_tell_it_with_the_end(scene: Scene, num: int) -> None:
    """The record and the stream of outcomes have it; the output went out before."""
    scene.bring(S.RUNNING)
    emit(scene, 0, None)
    settle(scene, 1, CachedPrompt(found_tokens=0), num=num)

    assert scene.record().cached_tokens == 0
    assert told(scene) == [None] * (2 + num)
    assert scene.executor.run(scene.reads.finished(count=1))[0].cached_tokens == 0
    check(scene)


def test_an_output_that_is_written_at_its_end_tells_it_too(scene: Scene) -> None:
    """What is pinned writes nothing before."""
    scene.bring(S.RUNNING)
    settle(scene, 0, CACHED, num=3)
    assert scene.record().cached_tokens == 64
    assert told(scene) == [CACHED, None]


def test_untold_it_is_not_known(scene: Scene) -> None:
    """No field, no part of an entry."""
    scene.bring(S.RUNNING)
    emit(scene, 0, None)
    settle(scene, 1, None, num=1)
    assert scene.record().cached_tokens is None
    assert told(scene) == [None, None, None]
    assert scene.executor.run(scene.reads.finished(count=1))[0].cached_tokens is None
    assert b"cached_tokens" not in scene.raw.hgetall(scene.keys.request("a"))


def test_a_lease_that_goes_on_does_not_change_it(scene: Scene) -> None:
    """It is that of the prefill which gave the first token."""
    scene.bring(S.RUNNING)
    emit(scene, 0, CACHED)
    scene.executor.run(scene.calls.release("a", incarnation="w1", epoch=1))
    scene.grant()
    emit(scene, 1, CachedPrompt(found_tokens=128), epoch=2)
    assert scene.record().cached_tokens == 64


@pytest.mark.parametrize("foreign", ["", "x", "1 2 3", "-1", "9" * 16])
def test_what_nobody_wrote_is_not_read(foreign: str) -> None:
    assert CachedPrompt.parse(foreign.encode()) is None
    assert CachedPrompt.parse(None) is None


@pytest.mark.parametrize(
    "cached", [CACHED, CachedPrompt(found_tokens=0), CachedPrompt(found_tokens=7, made_tokens=0)]
)
def test_what_is_packed_is_read_back(cached: CachedPrompt) -> None:
    assert CachedPrompt.parse(cached.pack().encode()) == cached
