"""The output stream: contiguous, never repeated or changed, resumable by token offset."""

from __future__ import annotations

from typing import Any

import pytest

from l4queue.models import RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.records import Outcome, TokenLogprobs
from tests.protocol.consistency import check
from tests.protocol.scene import Scene

RUNNING = RequestState.RUNNING


@pytest.mark.parametrize(
    ("offset", "num", "verdict"),
    [
        (4, 2, Verdict.OK),
        (2, 2, Verdict.DUP),
        (0, 2, Verdict.DUP),
        (0, 4, Verdict.DUP),
        (3, 1, Verdict.DUP),
        (4, 0, Verdict.DUP),
        (2, 3, Verdict.HAVE),
        (3, 2, Verdict.HAVE),
        (0, 9, Verdict.HAVE),
        (5, 1, Verdict.GAP),
        (6, 2, Verdict.GAP),
        (5, 0, Verdict.GAP),
    ],
)
def test_tokens_are_appended_at_the_expected_offset_only(
    scene: Scene, offset: int, num: int, verdict: Verdict
) -> None:
    """Four tokens are there; what overlaps, repeats or leaves a hole is answered and not written."""
    scene.bring(RUNNING)
    scene.emit(num=4)
    before = scene.dump()

    assert scene.emit(offset=offset, num=num) is verdict

    assert (scene.dump() == before) is (verdict is not Verdict.OK)
    check(scene)


@pytest.mark.parametrize(("offset", "num"), [(3, 1), (2, 1), (0, 1), (5, 0), (6, 3), (3, 3)])
def test_an_outcome_whose_last_tokens_do_not_fit_is_not_written(scene: Scene, offset: int, num: int) -> None:
    """All but (4, n) and what ends exactly at 4 is a gap."""
    scene.bring(RUNNING)
    scene.emit(num=4)
    before = scene.dump()
    expected = Verdict.OK if offset + num == 4 else Verdict.GAP

    assert scene.settle(offset=offset, num=num) is expected

    assert (scene.dump() == before) is (expected is Verdict.GAP)


def test_an_outcome_carries_its_last_tokens_and_the_text_held_back(scene: Scene) -> None:
    """One write: tokens, then the end marker with the rest of the text."""
    scene.bring(RUNNING)
    scene.emit(num=2)
    scene.settle(offset=2, num=3)

    entries = scene.executor.run(scene.reads.output("a"))

    assert [(e.upto, len(e.token_ids), e.state) for e in entries] == [
        (2, 2, None),
        (5, 3, None),
        (5, 0, RequestState.DONE),
    ]
    assert entries[-1].text == "end"
    assert scene.record().offset == 5


def test_an_outcome_after_its_lost_last_emit_is_the_same(scene: Scene) -> None:
    """The emit was executed and its reply lost; settle repeats these tokens and must not double them."""
    scene.bring(RUNNING)
    scene.emit(num=2)
    scene.emit(offset=2, num=2)

    assert scene.settle(offset=2, num=2) is Verdict.OK

    assert scene.shown() == [(1000, 1001), (1002, 1003), ()]
    check(scene)


@pytest.mark.parametrize("after", [0, 2, 3, 5])
def test_a_client_resumes_by_offset(scene: Scene, after: int) -> None:
    """What follows the tokens a client has, the end marker included, however it was cut into entries."""
    scene.bring(RUNNING)
    scene.emit(num=2)
    scene.emit(offset=2, num=1)
    scene.settle(offset=3, num=2)

    entries = scene.executor.run(scene.reads.output("a", after=after))

    tokens = [t for e in entries for t in e.token_ids]
    assert tokens == scene.tokens(1, after, 5 - after)
    assert entries[-1].state is RequestState.DONE


def test_the_first_token_is_timed_once(scene: Scene) -> None:
    """A resume does not move the time to first token."""
    scene.bring(RUNNING)
    scene.emit(num=1)
    first = scene.record().first_token_ms
    assert first is not None
    scene.raw.hset(scene.keys.request("a"), "first_token_ms", first - 500)
    scene.release()
    scene.grant()
    scene.emit("a", "w1", 2, 1, 1)
    scene.settle("a", "w1", 2, 2, 1)

    assert scene.record().first_token_ms == first - 500


def test_a_request_that_ends_with_its_first_token_has_its_time(scene: Scene) -> None:
    """Settle alone may carry all tokens there are."""
    scene.bring(RUNNING)
    scene.settle(num=1)

    record = scene.record()
    assert record.first_token_ms is not None
    assert record.e2e_ms is not None


def test_logprobs_are_written_with_their_tokens_and_only_if_there_are_any(scene: Scene) -> None:
    """By emit and by settle; a repeated emit adds none. What was not asked for takes no room."""
    scene.bring(RUNNING)
    rows = [
        TokenLogprobs(token_id=1000 + i, logprob=-i / 4, top=((1000 + i, -i / 4), (7, -9.5))) for i in range(4)
    ]
    owner: dict[str, Any] = {"incarnation": "w1", "epoch": 1, "text": "a"}
    first = scene.calls.emit("a", **owner, offset=0, token_ids=[1000, 1001], logprobs=rows[:2])
    done = Outcome(state=RequestState.DONE)
    assert [scene.executor.run(first), scene.executor.run(first)] == [Verdict.OK, Verdict.DUP]
    assert scene.emit(offset=2, num=1) is Verdict.OK
    scene.executor.run(
        scene.calls.settle("a", **owner, offset=3, token_ids=[1003], logprobs=rows[3:], outcome=done)
    )

    entries = scene.executor.run(scene.reads.output("a"))

    assert [entry.logprobs for entry in entries] == [tuple(rows[:2]), None, (rows[3],), None]
    fields = [set(values) for _, values in scene.raw.xrange(scene.keys.output("a"))]
    assert fields[:3] == [{b"t", b"x", b"l"}, {b"t", b"x"}, {b"t", b"x", b"l"}]
    assert {b"e", b"x"} < fields[3]
    assert not {b"t", b"l"} & fields[3]
    check(scene)


def test_text_survives_as_it_was(scene: Scene) -> None:
    """Multi-byte characters, NUL and newlines pass unchanged."""
    scene.bring(RUNNING)
    text = "é漢🙂\0\r\n"
    call = scene.calls.emit("a", incarnation="w1", epoch=1, offset=0, token_ids=[1000], text=text)
    scene.executor.run(call)

    (entry,) = scene.executor.run(scene.reads.output("a"))

    assert (entry.text, entry.token_ids) == (text, (1000,))
