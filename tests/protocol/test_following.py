"""Followers of a request: told of what is written and of the end, bounded, and nothing without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.records import Followed, NewsEntry, TokenLogprobs
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

S = RequestState
LIVE = (S.SUBMITTED, S.QUEUED, S.RUNNING)
ENDED = (S.DONE, S.FAILED, S.CANCELLED, S.EXPIRED)


def follow(
    scene: Scene, *ids: str, client: str = "n1", looked_at: tuple[str, ...] = (), ttl_ms: int = 60_000
) -> Followed:
    return scene.executor.run(scene.calls.follow(client, followed=ids, looked_at=looked_at, ttl_ms=ttl_ms))


def news(scene: Scene, client: str = "n1") -> list[NewsEntry]:
    entries = [NewsEntry.parse(values) for _, values in scene.raw.xrange(scene.keys.news(client))]
    return [entry for entry in entries if entry is not None]


def followers(scene: Scene, request_id: str = "a") -> list[str]:
    return (scene.raw.hget(scene.keys.request(request_id), "followers") or b"").decode().split()


@pytest.mark.parametrize("state", LIVE)
def test_a_live_request_is_followed_once(scene: Scene, state: RequestState) -> None:
    """The answer says where it is; a repeat after a lost reply changes nothing."""
    scene.bring(state)
    assert follow(scene, "a") == Followed(is_new=True, places=((state, 0),))
    before = scene.dump()
    assert follow(scene, "a") == Followed(is_new=False, places=((state, 0),))
    assert scene.dump() == before
    assert followers(scene) == ["n1"]
    check(scene)


@pytest.mark.parametrize("state", ENDED)
def test_what_has_ended_is_not_followed(scene: Scene, state: RequestState) -> None:
    """Its state is answered, and its record is left as it was."""
    scene.bring(state)
    offset = scene.record().offset
    assert follow(scene, "a", "unknown").places == ((state, offset), (None, 0))
    assert followers(scene) == []
    assert scene.raw.exists(scene.keys.request("unknown")) == 0


def test_looking_changes_nothing(scene: Scene) -> None:
    """No follower, no stream."""
    scene.bring(S.RUNNING)
    scene.emit()
    before = scene.dump()
    assert follow(scene, looked_at=("a", "b")) == Followed(is_new=False, places=((S.RUNNING, 2), (None, 0)))
    assert scene.dump() == before


def test_followers_are_told_what_is_written_and_the_end(scene: Scene) -> None:
    """Each of them the same as the output stream has, in the same order, and once."""
    scene.bring(S.RUNNING)
    scene.emit(num=2)
    follow(scene, "a")
    follow(scene, "a", client="n2")
    for offset, num in ((2, 2), (2, 2), (3, 4), (9, 1), (4, 1)):
        scene.emit(offset=offset, num=num)
    scene.settle(offset=5, num=1)
    scene.settle(offset=5, num=1)

    for client in ("n1", "n2"):
        told = news(scene, client)
        assert [entry.entry for entry in told] == scene.executor.run(scene.reads.output("a", after=2))
        assert [entry.state for entry in told] == [None, None, None, S.DONE]
    assert followers(scene) == []
    check(scene)


ENDINGS: dict[str, Callable[[Scene], Any]] = {
    "cancel": lambda s: s.cancel(),
    "expire": lambda s: (s.overdue(), s.expire()),
    "late": lambda s: (s.late(), s.register(), s.take()),
    "refuse": lambda s: s.refuse(),
}


@pytest.mark.parametrize(
    ("ending", "state", "told"),
    [
        ("cancel", S.SUBMITTED, S.CANCELLED),
        ("cancel", S.RUNNING, S.CANCELLED),
        ("expire", S.QUEUED, S.EXPIRED),
        ("late", S.QUEUED, S.EXPIRED),
        ("refuse", S.SUBMITTED, S.FAILED),
    ],
)
def test_every_end_is_told(scene: Scene, ending: str, state: RequestState, told: RequestState) -> None:
    """Whatever ends the request."""
    scene.bring(state)
    follow(scene, "a")
    ENDINGS[ending](scene)
    assert [entry.state for entry in news(scene)] == [told]


def test_moves_and_crashes_keep_the_followers(scene: Scene) -> None:
    """They are of the request, not of its lease."""
    scene.bring(S.RUNNING)
    follow(scene, "a")
    scene.release()
    scene.grant()
    scene.emit(epoch=2)
    scene.crash()
    scene.grant()
    scene.emit(epoch=3, offset=2)
    assert [entry.upto for entry in news(scene)] == [2, 4]


def test_large_output_is_told_without_its_content(scene: Scene) -> None:
    """Logprobs count; small ones are told with it."""
    scene.bring(S.RUNNING)
    follow(scene, "a")
    rows = [TokenLogprobs(token_id=1000 + i, logprob=-0.5, top=((1, -0.25),) * 20) for i in range(40)]
    owner: dict[str, Any] = {"incarnation": "w1", "epoch": 1, "text": ""}
    small = scene.calls.emit("a", **owner, offset=0, token_ids=[1000], logprobs=rows[:1])
    large = scene.calls.emit("a", **owner, offset=1, token_ids=list(range(1001, 1040)), logprobs=rows[1:])
    assert scene.executor.run_many([small, large]) == [Verdict.OK] * 2
    first, second = news(scene)
    assert first.entry is not None
    assert first.entry.logprobs == tuple(rows[:1])
    assert (second.upto, second.entry) == (40, None)


def test_a_request_without_followers_tells_nobody(scene: Scene) -> None:
    """Those of another are not meant."""
    scene.bring(S.RUNNING)
    scene.submit("b")
    follow(scene, "b")
    scene.emit()
    scene.settle(offset=2)
    assert news(scene) == []


def test_a_client_that_has_gone_is_told_nothing(scene: Scene) -> None:
    """Its stream goes by itself, and nothing makes it again but the client."""
    scene.bring(S.RUNNING)
    follow(scene, "a", ttl_ms=5000)
    assert 0 < scene.raw.pttl(scene.keys.news("n1")) <= 5000
    scene.emit()
    assert 0 < scene.raw.pttl(scene.keys.news("n1")) <= 5000
    scene.raw.delete(scene.keys.news("n1"))
    scene.emit(offset=2)
    assert scene.raw.exists(scene.keys.news("n1")) == 0
    assert follow(scene, "a") == Followed(is_new=True, places=((S.RUNNING, 4),))
    scene.emit(offset=4)
    assert [entry.upto for entry in news(scene)] == [6]


def test_a_request_has_16_followers_at_most(scene: Scene) -> None:
    """A further one takes the place of those that have gone, else of the first."""
    scene.bring(S.RUNNING)
    for number in range(17):
        follow(scene, "a", client=f"n{number}")
    assert followers(scene) == [f"n{number}" for number in range(1, 17)]
    for number in (3, 5):
        scene.raw.delete(scene.keys.news(f"n{number}"))
    follow(scene, "a", client="new")
    assert followers(scene) == [f"n{number}" for number in range(1, 17) if number not in (3, 5)] + ["new"]


def test_names_that_contain_each_other_are_different(scene: Scene) -> None:
    """`n1` and `n11`."""
    scene.bring(S.RUNNING)
    follow(scene, "a", client="n11")
    follow(scene, "a", client="n1")
    assert followers(scene) == ["n11", "n1"]


def test_a_client_that_unfollows_is_told_nothing_more(scene: Scene) -> None:
    """The others are; a repeat changes nothing."""
    scene.bring(S.RUNNING)
    for client in ("n1", "n2", "n3"):
        follow(scene, "a", client=client)
    verdicts = [scene.executor.run(scene.calls.unfollow("a", client_id="n2")) for _ in range(2)]
    assert verdicts == [Verdict.OK, Verdict.DUP]
    assert followers(scene) == ["n1", "n3"]
    for client in ("n1", "n3"):
        scene.executor.run(scene.calls.unfollow("a", client_id=client))
    assert scene.raw.hexists(scene.keys.request("a"), "followers") == 0
    assert scene.executor.run(scene.calls.unfollow("gone", client_id="n1")) is Verdict.DUP
    assert scene.raw.exists(scene.keys.request("gone")) == 0
    check(scene)


def test_news_are_bounded(scene: Scene) -> None:
    """Whoever does not read loses the oldest, and reads the output stream."""
    scene.bring(S.RUNNING)
    follow(scene, "a")
    pipe = scene.raw.pipeline()
    for _ in range(60_000):
        pipe.xadd(scene.keys.news("n1"), {"v": "1"})
    pipe.execute()
    scene.emit()
    assert scene.raw.xlen(scene.keys.news("n1")) <= 50_200
