"""Limits of the lines of a batch: each once, in groups that fit into half of a limit, behind requests of HTTP."""

from __future__ import annotations

from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from tests.protocol.limits import MINUTE_MS, charge, charge_lines, charged, pass_ms, refund
from tests.protocol.scene import Scene

KEYED = "k" + "0123456789abcdef0123456789abcde"
LOOK_EVERY_MS = STAND_BACK_MS = 5000


def level(scene: Scene, name: str = "tokens") -> float:
    """Of a bucket, as it was last written."""
    return float(scene.raw.hget(scene.keys.limit("ann"), name))


def test_lines_are_counted_one_by_one_up_to_half_of_a_limit(scene: Scene) -> None:
    """As many as fit, from the first on; the next ones when there is room for one."""
    found = charge_lines(scene, "a", "b", "c", tokens=20, tokens_per_minute=100, requests_per_minute=100)
    assert (found.num_counted, found.full) == (2, "tokens")
    assert 5000 < found.retry_after_ms <= 6000  # ten of a hundred tokens are to leak
    assert (found.tokens.room, found.requests.room) == (60, 98)
    assert charged(scene) == {"a": 20, "b": 20, "*": 40}
    pass_ms(scene, 6000)
    found = charge_lines(scene, "c", "d", tokens=20, tokens_per_minute=100, requests_per_minute=100)
    assert (found.num_counted, found.full) == (1, "tokens")
    assert charged(scene) == {"a": 20, "b": 20, "c": 20, "*": 60}


def test_each_line_is_a_request(scene: Scene) -> None:
    """Six a minute: three lines at once, then one for each ten seconds."""
    found = charge_lines(scene, *"abcde", requests_per_minute=6)
    assert (found.num_counted, found.full, found.requests.room) == (3, "requests", 3)
    assert 9000 < found.retry_after_ms <= 10_000
    assert charge(scene, "x", requests_per_minute=6).full == ""  # the other half is free


def test_a_line_that_is_counted_is_not_counted_again(scene: Scene) -> None:
    """A gateway that goes on with the batch of another one asks for the same lines, and for those behind."""
    most = {"tokens_per_minute": 100, "requests_per_minute": 100}
    charge_lines(scene, "a", "b", tokens=20, **most)
    for _ in range(2):
        again = charge_lines(scene, "a", "b", "c", tokens=20, **most)
        assert (again.num_counted, again.full) == (2, "tokens")
        assert again.requests.room == 98
    assert charged(scene) == {"a": 20, "b": 20, "*": 40}


def test_a_settled_line_is_known_as_long_as_its_record(scene: Scene) -> None:
    """Its gateway died before the answer was durable. Computed anew, it is charged anew, and under any id."""
    for number in range(2):
        assert charge_lines(scene, KEYED, tokens=40, tokens_per_minute=100).num_counted == 1
        assert charged(scene) == {KEYED: 40, "*": 40}
        request_id = scene.submit(KEYED, digest="d", key_ttl_ms=60_000).request_id
        assert request_id is not None
        assert (request_id == KEYED) is (number == 0)
        assert charge_lines(scene, KEYED, tokens=40, tokens_per_minute=100).num_counted == 1
        scene.route(request_id)
        scene.register()
        scene.grant()
        assert scene.settle(request_id, num=2) is Verdict.OK
        assert refund(scene, KEYED, used=5, tokens_per_minute=100) == -35
        before = level(scene)
        assert charge_lines(scene, KEYED, tokens=40, tokens_per_minute=100).num_counted == 1
        assert (charged(scene), level(scene)) == ({"*": 0}, before)
        scene.executor.run(scene.keeping.discard([request_id]))
        pass_ms(scene, MINUTE_MS)


def test_a_line_larger_than_its_half_waits_for_an_empty_bucket(scene: Scene) -> None:
    """As any request larger than a limit does."""
    assert charge_lines(scene, "a", tokens=1, tokens_per_minute=100).num_counted == 1
    assert charge_lines(scene, "b", tokens=70, tokens_per_minute=100).full == "tokens"
    pass_ms(scene, MINUTE_MS)
    assert charge_lines(scene, "b", "c", tokens=70, tokens_per_minute=100).num_counted == 1
    assert charge_lines(scene, "x", tokens=500, backlog_tokens=100).full == "backlog"
    refund(scene, "a", "b", used=0)
    assert charge_lines(scene, "x", "y", tokens=500, backlog_tokens=100).num_counted == 1


def test_lines_stand_back_for_a_request_that_was_refused(scene: Scene) -> None:
    """It needs more than the free half: until it may come again, and five seconds more, no line takes the room."""
    most = {"tokens_per_minute": 100}
    assert charge_lines(scene, "a", "b", tokens=25, **most).num_counted == 2
    refused = charge(scene, "x", tokens=80, **most)
    assert refused.full == "tokens"
    pass_ms(scene, 20_000)
    held = charge_lines(scene, "a", "c", tokens=5, **most)
    assert (held.num_counted, held.full) == (1, "tokens")  # a line that is known is no matter
    wanted_ms = refused.retry_after_ms + STAND_BACK_MS
    assert 0 < held.retry_after_ms <= wanted_ms
    name, since, until = scene.raw.hget(scene.keys.limit("ann"), "refused").split()
    assert int(until) - int(since) == wanted_ms
    scene.raw.hset(scene.keys.limit("ann"), "tokens", 0)
    assert charge(scene, "y", tokens=1, **most).full == ""  # that is for lines alone
    is_over = b"%s %d %d" % (name, int(since) - wanted_ms, int(since))
    is_of_a_later_clock = b"tokens 99999999999999 999999999999999"
    for line, told in (("d", is_over), ("e", is_of_a_later_clock)):
        scene.raw.hset(scene.keys.limit("ann"), "refused", told)
        scene.raw.hset(scene.keys.limit("ann"), "tokens", 0)
        assert charge_lines(scene, line, tokens=5, **most).full == ""
    assert charge(scene, "x", tokens=80, **most).full == ""


def test_a_refused_line_makes_no_other_stand_back(scene: Scene) -> None:
    """Another batch of the key may have smaller lines."""
    assert charge_lines(scene, "a", "b", tokens=40, tokens_per_minute=100).full == "tokens"
    assert charge_lines(scene, "c", tokens=10, tokens_per_minute=100).full == ""


def test_lines_fill_half_of_the_backlog(scene: Scene) -> None:
    """Those that ended unsettled are looked for now and then, and settled: their gateway has died."""
    most = {"backlog_tokens": 100, "tokens_per_minute": 1000}
    scene.bring(RequestState.DONE, "a")
    scene.submit("b")
    for name in ("a", "b"):
        assert charge_lines(scene, name, tokens=20, **most).num_counted == 1  # known by its record
    assert charged(scene) == {}
    for name in ("a", "b"):
        charge(scene, name, tokens=20, **most)
    at, charged_level = scene.raw.hget(scene.keys.limit("ann"), "at"), level(scene)
    found = charge_lines(scene, "c", "d", tokens=20, **most)
    assert (found.num_counted, found.full, found.retry_after_ms) == (1, "backlog", 1000)
    assert charged(scene) == {"b": 20, "c": 20, "*": 40}
    leaked = (int(scene.raw.hget(scene.keys.limit("ann"), "at")) - int(at)) * 1000 / MINUTE_MS
    assert abs(level(scene) - (charged_level - leaked - 20 + 4 + 20)) < 0.1  # a has used 4 of 20 tokens
    scene.cancel("b")
    assert charge_lines(scene, "d", tokens=20, **most).full == "backlog"  # somebody has just looked
    looked = int(scene.raw.hget(scene.keys.limit("ann"), "looked"))
    scene.raw.hset(scene.keys.limit("ann"), "looked", looked - LOOK_EVERY_MS)
    assert charge_lines(scene, "d", "e", tokens=20, **most).num_counted == 1
    assert charged(scene) == {"c": 20, "d": 20, "*": 40}
    assert charge(scene, "x", tokens=60, **most).full == ""  # over HTTP all of it may be filled


def test_a_request_that_the_queue_does_not_get_is_not_kept(scene: Scene) -> None:
    """It counts as a request, against no other limit."""
    most = {"requests_per_minute": 2, "tokens_per_minute": 10, "backlog_tokens": 10}
    charge(scene, "a", tokens=50, num_requests=0, **most)
    assert [charge(scene, "", tokens=0, **most).full for _ in range(3)] == ["", "", "requests"]
    assert charged(scene) == {"a": 50, "*": 50}
