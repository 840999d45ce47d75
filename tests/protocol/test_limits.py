"""Limits of callers: buckets that leak, tokens of the backlog, charges that may be repeated."""

from __future__ import annotations

from tests.protocol.limits import MINUTE_MS, charge, charged, pass_ms, refund
from tests.protocol.scene import Scene


def test_requests_are_counted_in_a_bucket_that_leaks(scene: Scene) -> None:
    """Two a minute: the third waits half a minute, as long as one takes to leak."""
    assert charge(scene, "a", requests_per_minute=2).requests.room == 1
    assert charge(scene, "b", requests_per_minute=2).requests.room == 0
    refused = charge(scene, "c", requests_per_minute=2)
    assert refused.full == "requests"
    assert 29_000 < refused.retry_after_ms <= 30_000
    assert 59_000 < refused.requests.empty_in_ms <= MINUTE_MS
    pass_ms(scene, 30_000)
    assert charge(scene, "c", requests_per_minute=2).full == ""
    assert charge(scene, "d", requests_per_minute=2).full == "requests"
    assert charge(scene, "d", num_requests=0, requests_per_minute=2).full == ""  # of a request that was counted


def test_a_charge_that_is_repeated_counts_once(scene: Scene) -> None:
    """Its reply may have been lost."""
    first = charge(scene, "a", "b", tokens=20, tokens_per_minute=100)
    again = charge(scene, "a", "b", tokens=20, tokens_per_minute=100)
    assert (first.tokens.room, again.full) == (60, "")
    assert again.tokens.room in (60, 61)
    assert charged(scene) == {"a": 20, "b": 20, "*": 40}


def test_what_is_not_used_is_given_back(scene: Scene) -> None:
    """Once; and what was used beyond it is counted, too."""
    charge(scene, "a", tokens=100, tokens_per_minute=100)
    assert charge(scene, "b", tokens=50, tokens_per_minute=100).full == "tokens"
    assert [refund(scene, "a", used=30, tokens_per_minute=100) for _ in range(2)] == [-70, 0]
    assert charged(scene) == {"*": 0}
    assert charge(scene, "b", tokens=50, tokens_per_minute=100).tokens.room in (20, 21)
    assert refund(scene, "b", used=250, tokens_per_minute=100) == 200
    late = charge(scene, "c", tokens=1, tokens_per_minute=100)
    assert late.full == "tokens"
    assert 100_000 < late.retry_after_ms <= 110_000  # 280 of 100 are counted


def test_a_refund_changes_nothing_but_tokens(scene: Scene) -> None:
    """The bucket of requests leaks as it would."""
    both = {"requests_per_minute": 2, "tokens_per_minute": 100}
    charge(scene, "a", tokens=100, **both)
    charge(scene, "b", tokens=0, **both)
    pass_ms(scene, 15_000)
    refund(scene, "a", used=0, **both)
    found = charge(scene, "c", tokens=100, **both)
    assert (found.full, found.tokens.room) == ("requests", 100)
    assert 14_000 < found.retry_after_ms <= 15_000


def test_a_refund_lets_nothing_leak_twice(scene: Scene) -> None:
    """A quarter of a minute has passed, and 40 of 100 tokens were not used."""
    charge(scene, "a", tokens=100, tokens_per_minute=100)
    pass_ms(scene, 15_000)
    refund(scene, "a", used=60, tokens_per_minute=100)
    assert charge(scene, "b", tokens=100, tokens_per_minute=100).tokens.room in (65, 66)


def test_one_that_is_larger_than_a_limit_waits_for_an_empty_bucket(scene: Scene) -> None:
    """Nothing could be served otherwise; those behind it wait for all that it takes."""
    assert charge(scene, "a", tokens=1, tokens_per_minute=100).full == ""
    assert charge(scene, "b", tokens=500, tokens_per_minute=100).full == "tokens"
    pass_ms(scene, MINUTE_MS)
    assert charge(scene, "b", tokens=500, tokens_per_minute=100).full == ""
    assert charge(scene, "c", tokens=1, tokens_per_minute=100).retry_after_ms > 4 * MINUTE_MS - 2_000


def test_the_backlog_of_a_caller_is_what_has_not_ended(scene: Scene) -> None:
    """Requests whose gateway has died count until they end, and no longer."""
    for name in ("a", "b"):
        scene.submit(name)
        assert charge(scene, name, tokens=40, backlog_tokens=100).full == ""
    assert charge(scene, "c", tokens=40, backlog_tokens=100).full == "backlog"
    scene.cancel("a")
    assert charge(scene, "c", tokens=40, backlog_tokens=100).full == ""
    assert charged(scene) == {"b": 40, "c": 40, "*": 80}  # the last one is on its way
    assert charge(scene, "d", tokens=21, backlog_tokens=100).full == "backlog"
    refund(scene, "b", "c", used=1)
    assert charge(scene, "d", tokens=1000, backlog_tokens=100).full == ""


def test_one_that_never_came_counts_for_a_minute(scene: Scene) -> None:
    """Its gateway died on the way."""
    charge(scene, "a", tokens=100, backlog_tokens=100)
    assert charge(scene, "b", tokens=1, backlog_tokens=100).full == "backlog"
    name = scene.keys.charged("ann")
    since = int(scene.raw.hget(name, "a").split()[1])
    scene.raw.hset(name, "a", f"100 {since - MINUTE_MS}")
    assert charge(scene, "b", tokens=1, backlog_tokens=100).full == ""
    assert charged(scene) == {"b": 1, "*": 1}


def test_all_of_a_charge_or_nothing(scene: Scene) -> None:
    """And what others wrote there is no obstacle."""
    assert charge(scene, "a", "b", "c", tokens=40, backlog_tokens=100, requests_per_minute=9).requests.room == 8
    refused = charge(scene, "d", "e", tokens=1, backlog_tokens=100, requests_per_minute=9)
    assert (refused.full, refused.requests.room) == ("backlog", 8)
    scene.raw.hset(scene.keys.limit("ann"), mapping={"requests": "x", "at": "y"})
    scene.raw.hset(scene.keys.charged("ann"), mapping={"a": "x", "*": "y"})
    assert charge(scene, "d", tokens=1, backlog_tokens=100, requests_per_minute=9).full == ""
    scene.raw.delete(scene.keys.limit("ann"))
    scene.raw.set(scene.keys.limit("ann"), "no hash")
    assert charge(scene, "e", tokens=1, requests_per_minute=9).requests.room == 8
