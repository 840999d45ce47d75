"""What the inbox tells a dispatcher: enough to route a request without its record, and never much."""

from __future__ import annotations

from typing import Any

import pytest

from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.parsing import body_told
from l4queue.protocol.reads import InboxBody
from l4queue.protocol.records import pack_ids
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

IDS = [7, 3, 70_000, 0]


def _told(scene: Scene) -> dict[bytes, bytes]:
    ((_, values),) = scene.raw.xrange(scene.keys.inbox)
    found: dict[bytes, bytes] = values
    return found


@pytest.mark.parametrize("kind", ["p", "m"])
def test_a_short_text_is_told_as_the_record_has_it(scene: Scene, kind: str) -> None:
    """So nobody has to read the record; its memory is counted until it is routed."""
    scene.submit(kind=kind, prompt=b"hello", body='{"priority":3}', has_open_end=True)
    one = scene.counts()["live_bytes"]

    assert body_told(_told(scene)) == scene.executor.run(scene.reads.body("a"))
    scene.cancel()
    scene.submit("b", kind=kind, prompt=b"hello" + b"!" * 500, body='{"priority":3}', has_open_end=True)
    assert scene.counts()["live_bytes"] > one + 900, "in the record and in the inbox"


def test_a_long_text_is_told_by_its_size(scene: Scene) -> None:
    """It stays in the record alone."""
    scene.submit(prompt=b"x" * 2000, body="{}")

    assert _told(scene) == {b"i": b"a", b"b": b"2002"}
    assert body_told(_told(scene)) is None


def test_ids_stay_where_they_are(scene: Scene) -> None:
    """However many: the inbox has their number and the greatest, and what a worker gets is what was submitted."""
    prompt = pack_ids(IDS * 1000)
    scene.submit(kind="t", prompt=prompt, greatest_id=max(IDS), charge_tokens=10, max_live_bytes=10**9)
    told = body_told(_told(scene))

    assert told is not None
    assert (told.num_ids, told.greatest_id, told.prompt) == (4000, 70_000, b"")
    assert sum(map(len, _told(scene).values())) < 100
    assert scene.route(token_ids=(), num_stored=4000) is Verdict.OK
    scene.register()
    assert scene.grant().packed_ids == prompt
    assert scene.record("a").prompt_tokens == 4000
    assert not {b"prompt", b"entry"} & set(scene.raw.hkeys(scene.keys.request("a")))
    check(scene)


def test_ids_of_another_number_are_no_prompt(scene: Scene) -> None:
    """Somebody else has written the record, or the inbox."""
    for num_stored in (3, 5):
        name = f"r{num_stored}"
        scene.submit(name, kind="t", prompt=pack_ids(IDS), greatest_id=max(IDS))

        assert scene.route(name, token_ids=(), num_stored=num_stored) is Verdict.DUP
        assert scene.record(name).state is RequestState.FAILED
    check(scene)


@pytest.mark.parametrize(
    "over", [{b"k": b"z"}, {b"k": None}, {b"y": None}, {b"s": b"soon"}, {b"n": b"-1"}, {b"g": b"x"}, {b"g": None}]
)
def test_an_entry_that_nobody_of_us_wrote_says_nothing(over: dict[bytes, Any]) -> None:
    """Then the record is read."""
    whole = {b"i": b"a", b"k": b"t", b"y": b"{}", b"s": b"5", b"o": b"0", b"n": b"4", b"g": b"9"}
    told = InboxBody(state="submitted", kind="t", prompt=b"", body=b"{}", submitted_ms=5, num_ids=4, greatest_id=9)
    assert body_told(whole) == told
    assert body_told({name: value for name, value in (whole | over).items() if value is not None}) is None


def test_a_time_that_never_was_is_told_no_more(scene: Scene) -> None:
    """The server's clock went back: repair sets the times of the record right, and the dispatcher reads those."""
    scene.submit()
    entry = scene.entry()
    record = scene.keys.request("a")
    scene.raw.hincrby(record, "submitted_ms", 3_600_000)

    assert scene.repair(forgotten_ms=60_000) == "FINE"
    assert _told(scene) == {b"i": b"a"}
    assert scene.entry() != entry
    assert scene.route() is Verdict.OK
    check(scene)
