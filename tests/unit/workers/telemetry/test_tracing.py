"""Lives of requests told as spans: names, places, times without a gap, and what ended a lease."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.models import RequestState
from l4queue.protocol.ledger import LEASE_ENDS, MOVES
from l4queue.protocol.records import RequestRecord
from workers.telemetry.tracing import SpanSpec, build_spans

DONE = RequestRecord(
    request_id="r",
    state=RequestState.DONE,
    epoch=1,
    offset=9,
    worker="w1",
    prompt_tokens=5,
    submitted_ms=1000,
    queued_ms=1002,
    started_ms=1005,
    first_token_ms=1010,
    finished_ms=1100,
)


def _line(what: str, at_ms: int, **facts: object) -> str:
    return json.dumps({"what": what, "at_ms": at_ms, "worker": "w0", "to": "0", "offset": 0, **facts})


def _shape(pieces: list[SpanSpec]) -> list[tuple[str, int, int, str | None]]:
    """Name, start, end, and the name of what it is a part of."""
    names = [piece.name for piece in pieces]
    return [
        (piece.name, piece.start_ms, piece.end_ms, None if piece.inside is None else names[piece.inside])
        for piece in pieces
    ]


def test_an_ordinary_life() -> None:
    """One lease leaves no line: its times are in the record."""
    pieces = build_spans(DONE, [])

    assert _shape(pieces) == [
        ("request", 1000, 1100, None),
        ("route", 1000, 1002, "request"),
        ("wait", 1002, 1005, "request"),
        ("prefill", 1005, 1010, "request"),
        ("decode", 1010, 1100, "request"),
    ]
    assert pieces[3].attributes == {"worker": "w1", "context_tokens": 5}
    assert pieces[4].attributes == {"worker": "w1", "tokens": 9}
    assert all(piece.error is None for piece in pieces)


def test_a_hand_over_holds_the_wait_and_the_prefill_that_it_costs() -> None:
    """It lasts from the old worker's last token to the new one's first."""
    ledger = [
        _line("hand-over", 1040, to="@w1", offset=4, benefit_ms=80.0, cost_ms=7.0, kv=True),
        _line("taken", 1041, worker="w1"),
        _line("resumed", 1050, gap_ms=10),
    ]
    pieces = build_spans(replace(DONE, epoch=2), ledger)

    assert _shape(pieces)[3:] == [
        ("prefill", 1005, 1010, "request"),
        ("decode", 1010, 1040, "request"),
        ("hand-over", 1040, 1050, "request"),
        ("wait", 1040, 1041, "hand-over"),
        ("prefill", 1041, 1050, "hand-over"),
        ("decode", 1050, 1100, "request"),
    ]
    before, move, _, prefill, after = pieces[4:]
    assert before.attributes == {"worker": "w0", "tokens": 4, "ended_by": "hand-over"}
    assert move.attributes == {
        "move": "hand-over", "from": "w0", "to": "w1", "benefit_ms": 80.0, "cost_ms": 7.0, "kv": True,
    }  # fmt: skip
    assert prefill.attributes == {"worker": "w1", "context_tokens": 9}
    assert after.attributes == {"worker": "w1", "tokens": 5}


@pytest.mark.parametrize("kind", MOVES)
def test_every_kind_of_move_is_a_hand_over_span(kind: str) -> None:
    """Its attribute `move` has the kind."""
    ledger = [
        _line(kind, 1040, to="@w1", offset=4, benefit_ms=80.0, cost_ms=7.0, kv=False),
        _line("taken", 1041, worker="w1"),
        _line("resumed", 1050, gap_ms=10),
    ]

    (move,) = [piece for piece in build_spans(replace(DONE, epoch=2), ledger) if piece.name == "hand-over"]

    assert (move.start_ms, move.end_ms, move.attributes["move"], move.error) == (1040, 1050, kind, None)


def test_a_crash_before_and_after_the_first_token() -> None:
    """What the killed workers did is told by the one that ended it; only their own spans have failed."""
    ledger = [
        _line("lost", 1008),
        _line("taken", 1009, worker="w2"),
        _line("resumed", 1010, worker="w2"),
        _line("lost", 1060, worker="w2", offset=6),
        _line("taken", 1061, worker="w1"),
        _line("resumed", 1070, worker="w1"),
    ]
    pieces = build_spans(replace(DONE, epoch=3, crashes=2), ledger)

    assert [(p.name, p.attributes.get("worker"), p.error) for p in pieces[2:]] == [
        ("wait", None, None),
        ("prefill", "w0", "its worker was lost"),
        ("wait", None, None),
        ("prefill", "w2", None),
        ("decode", "w2", "its worker was lost"),
        ("wait", None, None),
        ("prefill", "w1", None),
        ("decode", "w1", None),
    ]
    assert [p.attributes["tokens"] for p in pieces if p.name == "decode"] == [6, 3]


def test_a_first_lease_by_a_thief_and_a_queue_that_moved() -> None:
    """The line of the theft is the time of the lease; a new plan leaves the wait whole."""
    ledger = [_line("rerouted", 1003), _line("stolen", 1005, worker="w1", to="1")]
    assert [p.name for p in build_spans(DONE, ledger)] == ["request", "route", "wait", "prefill", "decode"]


def test_what_has_not_come_far() -> None:
    """Cancelled on the inbox, in the queue, and before its first token; the failure is on the request."""
    gone = replace(DONE, state=RequestState.CANCELLED, error="revoked", offset=0, first_token_ms=None)

    taken = build_spans(gone, [])
    queued = build_spans(replace(gone, started_ms=None), [])
    new = build_spans(replace(gone, started_ms=None, queued_ms=None), [])

    assert [p.name for p in taken] == ["request", "route", "wait", "prefill"]
    assert [p.name for p in queued] == [p.name for p in new] == ["request", "route", "wait"]
    assert {taken[0].error, taken[-1].error, queued[-1].error} == {"cancelled: revoked"}


STEPS = st.lists(
    st.tuples(st.sampled_from([event.value for event in LEASE_ENDS]), st.booleans()),
    max_size=12,
)


@given(STEPS, st.lists(st.integers(0, 3), min_size=60, max_size=60), st.booleans())
def test_no_time_is_told_twice_or_left_out(
    steps: list[tuple[str, bool]], pauses: list[int], ends_with_token: bool
) -> None:
    """Whatever moves a request, its leaves tile the time from acceptance to the end, in order."""
    times = iter(pauses)
    now_ms = 1005 + next(times)
    first_ms, offset, ledger = None, 0, list[str]()
    for number, (what, has_token) in enumerate(steps):
        if has_token:
            now_ms += next(times)
            first_ms, offset = first_ms or now_ms, offset + 1
            if number:
                ledger.append(_line("resumed", now_ms))
        now_ms += next(times)
        ledger.append(_line(what, now_ms, offset=offset, worker=f"w{number}"))
        now_ms += next(times)
        ledger.append(_line("taken", now_ms, worker=f"w{number + 1}"))
    if ends_with_token:
        now_ms += next(times)
        first_ms, offset = first_ms or now_ms, offset + 1
        if steps:
            ledger.append(_line("resumed", now_ms))
    end_ms = now_ms + next(times)
    record = replace(DONE, first_token_ms=first_ms, finished_ms=end_ms, offset=offset, epoch=len(steps) + 1)

    pieces = build_spans(record, ledger)

    holders = {piece.inside for piece in pieces}
    leaves = [piece for index, piece in enumerate(pieces) if index not in holders]
    assert leaves[0].start_ms == record.submitted_ms
    assert leaves[-1].end_ms == end_ms
    assert all(before.end_ms == after.start_ms for before, after in pairwise(leaves))
    assert all(piece.start_ms <= piece.end_ms for piece in pieces)
    assert sum(piece.attributes.get("tokens", 0) for piece in leaves) == offset
    for piece in pieces[1:]:
        whole = pieces[piece.inside or 0]
        assert whole.start_ms <= piece.start_ms <= piece.end_ms <= whole.end_ms
    workers = [piece.attributes["worker"] for piece in leaves if piece.name == "prefill"]
    assert workers == ([f"w{number}" for number in range(len(steps) + 1)] if steps else ["w1"])
