"""What headers say of an exchange, and which events of a stream a client has already."""

from __future__ import annotations

import pytest

from gateway.exchange import Exchange, begin
from l4queue.client.core import request_id_of
from l4queue.errors import InvalidRequest

BASE = "0123456789abcdef0123456789abcdef"


def test_headers_are_options() -> None:
    """Each by its name; a key belongs to its caller, and what has one outlives its connection."""
    exchange = begin(
        {"idempotency-key": "order-7", "x-l4-priority": "-3", "x-l4-deadline-s": "2.5", "x-l4-background": "true"},
        {"messages": []},
        caller="ann",
    )
    assert (exchange.priority, exchange.deadline_s, exchange.is_detached) == (-3, 2.5, True)
    assert exchange.base == request_id_of("ann:order-7")
    assert [exchange.key_of(number) for number in (0, 1)] == ["ann:order-7", "ann:order-7#1"]
    assert begin({"idempotency-key": "order-7"}, {}, caller="bob").base != exchange.base
    assert begin({"idempotency-key": "k"}, {}, caller="").is_detached
    assert begin({}, {"background": True}, caller="").is_detached
    assert not begin({}, {}, caller="").is_detached


@pytest.mark.parametrize(
    ("body", "is_open"),
    [
        ({"messages": []}, True),
        ({"messages": [], "max_tokens": None}, True),
        ({"messages": [], "max_completion_tokens": 3}, False),
        ({"input": "a", "max_output_tokens": 3}, False),
        ({"prompt": "a"}, False),  # 16 there, as OpenAI has it
    ],
)
def test_a_left_out_length_is_an_open_end(body: dict[str, object], is_open: bool) -> None:
    """Of chats and responses."""
    assert begin({}, body, caller="").has_open_end is is_open


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"x-l4-priority": "high"}, "X-L4-Priority"),
        ({"x-l4-deadline-s": "soon"}, "X-L4-Deadline-S"),
        ({"x-l4-background": "perhaps"}, "X-L4-Background"),
        ({"idempotency-key": "x" * 257}, "Idempotency-Key"),
        ({"last-event-id": "7"}, "Last-Event-ID"),
        ({"last-event-id": "someone-else/0/7/1"}, "Last-Event-ID"),
        ({"last-event-id": f"{BASE}/0/7/1", "idempotency-key": "k"}, "Last-Event-ID"),
    ],
)
def test_a_bad_header_is_named(headers: dict[str, str], field: str) -> None:
    """As its client wrote it."""
    with pytest.raises(InvalidRequest) as refused:
        begin(headers, {}, caller="")
    assert refused.value.field == field


def resumed(event_id: str, num_outputs: int) -> Exchange:
    exchange = begin({"last-event-id": event_id}, {}, caller="")
    exchange.next_outputs(num_outputs)
    return exchange


@pytest.mark.parametrize(
    ("headers", "has_ids"),
    [
        ({}, False),
        ({"x-l4-event-ids": "true"}, True),
        ({"x-l4-background": "1"}, True),
        ({"idempotency-key": "a"}, True),
        ({"last-event-id": "0" * 32 + "/0/1/1"}, True),
    ],
)
def test_events_have_ids_for_who_may_come_back(headers: dict[str, str], has_ids: bool) -> None:
    """Simple readers of streams know lines of data only."""
    assert begin(headers, {}, caller="").has_event_ids is has_ids


def test_an_event_is_known_by_the_tokens_behind_it() -> None:
    """Its id tells each output's tokens and end, before and with it; read back, it is a position."""
    exchange = begin({"x-l4-event-ids": "true"}, {}, caller="")
    exchange.next_outputs(2)
    exchange.advance({0: (3, False)})
    assert exchange.next_event() == f"{exchange.base}/0,0/3,0/1"
    assert exchange.next_event() == f"{exchange.base}/0,0/3,0/2"
    exchange.advance({1: (2, True)})
    event_id = exchange.next_event()
    assert event_id == f"{exchange.base}/3,0/3,2!/1"
    again = resumed(event_id, 2)
    assert again.base == exchange.base
    assert [again.cuts_of(number) for number in (0, 1)] == [((3, False), (3, False)), ((0, False), (2, True))]


def told(exchange: Exchange, *steps: tuple[dict[int, tuple[int, bool]] | int, int]) -> list[str]:
    """Places and numbers of the events that come out; each step is what was given, or taken, and its events."""
    found = []
    for given, num_events in steps:
        if isinstance(given, int):
            exchange.taken(given)
        else:
            exchange.advance(given)
        found += [event_id.partition("/")[2] for _ in range(num_events) if (event_id := exchange.next_event())]
    return found


def test_a_client_that_comes_back_gets_each_event_once() -> None:
    """Whichever event it had last, in the middle of what some tokens gave, at the end, or behind it."""

    def whole(exchange: Exchange, cuts: tuple[tuple[int, bool], tuple[int, bool]]) -> list[str]:
        (first, _), (second, ended) = cuts
        replay = [({0: (first, False)}, 2 if first else 0), ({0: (second - first, ended)}, 3 if not first else 1)]
        rest = [({0: (8 - second, not ended)}, 1)] if not ended else []
        return told(exchange, *(r for r in replay if r[0] != {0: (0, False)}), *rest, (1, 2))

    uncut = told(resumed_from_nothing(), ({0: (3, False)}, 3), ({0: (5, True)}, 1), (1, 2))
    assert uncut == ["0/3/1", "0/3/2", "0/3/3", "3/8!/1", "8!/8!/1", "8!/8!/2"]
    assert whole(resumed(f"{BASE}/0/3/1", 1), ((0, False), (3, False))) == uncut[1:]
    assert whole(resumed(f"{BASE}/0/3/3", 1), ((0, False), (3, False))) == uncut[3:]
    assert whole(resumed(f"{BASE}/3/8!/1", 1), ((3, False), (8, True))) == uncut[4:]
    exchange = resumed(f"{BASE}/8!/8!/1", 1)
    assert told(exchange, ({0: (8, True)}, 2), (1, 2)) == ["8!/8!/2"]


def said(exchange: Exchange, *outputs: int | None) -> list[str]:
    """Places and numbers of the events that come out; each tells of this output."""
    found = [exchange.next_event(output) for output in outputs]
    return [event_id.partition("/")[2] for event_id in found if event_id]


def test_events_of_several_prompts_tell_what_was_said() -> None:
    """The server takes more of one prompt before it has said what it took of another, and ends one before."""
    exchange = resumed_from_nothing()
    exchange.next_outputs(1)
    exchange.advance({0: (3, False)})
    exchange.advance({1: (2, False)})
    found = said(exchange, 0)
    exchange.advance({0: (5, True)})
    found += said(exchange, 1, 0)
    exchange.taken(1)
    exchange.advance({1: (4, True)})
    exchange.taken(1)
    found += said(exchange, 1, None, None)
    assert found == UNCUT


UNCUT = ["0,0/3,0/1", "3,0/3,2/1", "3,2/8!,2/1", "8!,2/8!,6!/1", "8!,6!/8!,6!/1", "8!,6!/8!,6!/2"]


@pytest.mark.parametrize(
    ("num_known", "rest"),
    [
        (1, ["3,0/3,2/1", "3,2/3,6!/1", "3,6!/8!,6!/1", *UNCUT[4:]]),
        (2, ["3,2/3,6!/1", "3,6!/8!,6!/1", *UNCUT[4:]]),
        (3, ["8!,2/8!,6!/1", *UNCUT[4:]]),
        (4, UNCUT[4:]),
        (5, UNCUT[5:]),
    ],
)
def test_a_client_of_several_prompts_comes_back(num_known: int, rest: list[str]) -> None:
    """Each output goes on from where the client has it, also when the other one is replayed before."""
    exchange = resumed(f"{BASE}/{UNCUT[num_known - 1]}", 1)
    exchange.next_outputs(1)
    cuts = {1: [(2, False), (4, True)], 0: [(3, False), (5, True)]}
    for output, pieces in cuts.items():
        for piece in pieces:
            exchange.advance({output: piece})
    exchange.taken(1)
    exchange.taken(1)
    assert said(exchange, 1, 1, 0, 0, None, None) == rest


def resumed_from_nothing() -> Exchange:
    exchange = begin({"x-l4-event-ids": "true"}, {}, caller="")
    exchange.next_outputs(1)
    return exchange
