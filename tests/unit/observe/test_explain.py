"""The story of a request: ordinary, moved, and in every way that a script can note."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from l4queue.models import RequestState
from l4queue.observe.explain import tell
from l4queue.protocol.ledger import LedgerEvent
from l4queue.protocol.records import RequestRecord

DONE = RequestRecord(
    request_id="r",
    state=RequestState.DONE,
    offset=9,
    plan=3,
    worker="w2",
    prompt_tokens=5,
    max_tokens=9,
    submitted_ms=1000,
    queued_ms=1001,
    started_ms=1002,
    first_token_ms=1010,
    finished_ms=1100,
    finish_reason="length",
)
WHY = json.dumps(
    {"stage": 0, "reason": "length in range", "drain_ms": 5.2, "alternatives": [{"stage": 1, "drain_ms": None}]}
)


def _line(what: str, at_ms: int = 1050, **facts: object) -> str:
    known = {
        "worker": "w1",
        "from": "0",
        "to": "@w2",
        "offset": 4,
        "benefit_ms": 80.0,
        "cost_ms": 7.0,
        "gap_ms": 3,
    }
    return json.dumps({"what": what, "at_ms": at_ms, **known, **facts})


def test_an_ordinary_life() -> None:
    """Everything from the record's times; the one who took it is the one who ended it."""
    events = tell(DONE, why=WHY, ledger=[])
    assert [event.what for event in events] == ["accepted", "routed", "taken", "first token", "done"]
    assert events[1].text == (
        "counted: 5 prompt tokens, at most 9 to generate; plan 3: stage 0 (length in range), drains in 5 ms;"
        " else stage 1 (load unknown)"
    )
    assert events[2].text == "taken by w2"
    assert events[-1].text == "done: 9 tokens, length"


def test_a_choice_has_its_reason() -> None:
    """Of the first lease; that of a later one would be told at the wrong place."""
    placed = replace(DONE, placed="holds most of its prefix", epoch=1)
    taken = tell(placed, why=None, ledger=[])[2]
    assert (taken.text, taken.facts["reason"]) == ("taken by w2: holds most of its prefix", placed.placed)
    assert tell(replace(placed, epoch=2), why=None, ledger=[])[2].text == "taken by w2"


def test_the_first_token_tells_of_the_prefix_cache() -> None:
    """Where the engine did."""
    texts = [tell(replace(DONE, cached_tokens=tokens), why=None, ledger=[])[3] for tokens in (None, 4)]
    assert texts[0].text == "first token, 10 ms after it was accepted"
    assert texts[1].text == f"{texts[0].text}; 4 of 5 prompt tokens were in the prefix cache"
    assert texts[1].facts == {"ttft_ms": 10, "cached_tokens": 4}


def test_a_moved_request_names_its_first_worker_and_the_price() -> None:
    """The record knows the last worker only; the ledger knows the first."""
    ledger = [_line("hand-over", 1050, kv=True), _line("taken", 1051, worker="w2"), _line("resumed", 1054)]
    events = tell(DONE, why=None, ledger=ledger)
    assert [event.what for event in events][2:] == [
        "taken",
        "first token",
        "hand-over",
        "taken",
        "resumed",
        "done",
    ]
    assert events[2].text == "taken by w1"
    assert events[4].text == (
        "hand-over from w1 to w2 after 4 tokens, with its KV cache: predicted benefit 80 ms, cost 7 ms"
    )
    assert events[6].text == "goes on after 3 ms without a token"


def test_a_stolen_request_was_taken_once() -> None:
    """The theft is the taking."""
    events = tell(DONE, why=None, ledger=[_line("stolen", 1002)])
    assert [event.what for event in events] == ["accepted", "routed", "stolen", "first token", "done"]


@pytest.mark.parametrize("what", LedgerEvent)
def test_every_note_that_a_script_can_make_has_a_text(what: str) -> None:
    """A text of its own, not the bare facts."""
    (event,) = [e for e in tell(DONE, why=None, ledger=[_line(what)]) if e.at_ms == 1050]
    assert len(event.text) > 10
    assert not event.text.startswith(f"{what}: ")


def test_a_request_that_only_waits_has_a_short_story() -> None:
    """Accepted, with a deadline."""
    record = RequestRecord(request_id="r", state=RequestState.SUBMITTED, submitted_ms=10, deadline_ms=510)
    (event,) = tell(record, why=None, ledger=[])
    assert event.text == "accepted, to be done within 500 ms"


def test_blame_that_was_taken_back_is_told() -> None:
    """With the worker that came back, what is left, and where the request waits now."""
    lines = [
        _line("lost", 1050, to="solo"),
        _line("rerouted", 1051, **{"from": "solo", "to": "1", "pardoned": "w1", "crashes": 1}),
        _line("rerouted", 1052, **{"from": "1", "to": "1", "pardoned": "w0", "crashes": 0}),
    ]
    events = tell(DONE, why=None, ledger=lines)
    assert [event.text for event in events if event.what == "rerouted"] == [
        "w1 came back: its loss is blamed on it no longer, crashes left: 1; moved from queue solo to stage 1",
        "w0 came back: its loss is blamed on it no longer, crashes left: 0",
    ]


def test_a_note_of_a_later_release_is_told_as_it_is() -> None:
    """Releases serve together; none fails at what another has written."""
    line = json.dumps({"what": "teleported", "at_ms": 1050, "worker": "w1", "distance": 3})
    (event,) = [e for e in tell(DONE, why=None, ledger=[line]) if e.what == "teleported"]
    assert event.text == "teleported: worker w1, distance 3"
