"""Words of the ledger: the same in scripts, groups and all readers."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest

from l4queue.cli.watch import view
from l4queue.observe import explain
from l4queue.observe.watch import RecentMove
from l4queue.protocol.calls import MoveKind
from l4queue.protocol.ledger import (
    FAULTS,
    LEASE_ENDS,
    MOVES,
    PRICED,
    REQUEUES,
    TAKES,
    LedgerEvent,
    MoveCounter,
    ResumeCounter,
    parse_line,
    requeue_counter,
)
from workers.telemetry import tracing

SCRIPTS = {
    path.name: path.read_text()
    for path in (files("l4queue.protocol") / "lua").iterdir()
    if path.name.endswith(".lua")
}
SOURCE = "".join(SCRIPTS.values())


def test_scripts_write_exactly_the_known_words() -> None:
    """Literals of `{what = ...}`, and the kinds of moves that callers pass to release."""
    heads = re.findall(r"\{what = ([^,}]*)", SOURCE)
    literals = {word for head in heads for word in re.findall(r"(?<!== )'([a-z-]+)'", head)}

    assert literals.isdisjoint(MoveKind)
    assert literals | set(MoveKind) == set(LedgerEvent)


def test_the_header_of_release_names_exactly_the_kinds_of_moves() -> None:
    """Callers pass them as an argument."""
    (kinds,) = re.findall(r"kind of move \('' = none \| ([^)]*)\)", SCRIPTS["release.lua"])
    assert set(kinds.split(" | ")) == set(MoveKind) == set(MOVES)


def test_every_word_is_in_one_group() -> None:
    """One that begins a lease, ends it, or does neither."""
    others = (LedgerEvent.RESUMED, LedgerEvent.REROUTED)
    assert sorted((*TAKES, *MOVES, *REQUEUES, *others)) == sorted(LedgerEvent)
    assert set(FAULTS) <= set(REQUEUES)
    assert set(LEASE_ENDS) | {LedgerEvent.STOLEN} >= set(PRICED)


def test_scripts_count_under_the_known_names() -> None:
    """Requeues by their word, as `requeue` builds them."""
    assert "'requeued_' .. line.what" in SCRIPTS["endings.lua"]
    assert requeue_counter(LedgerEvent.LOST) == "requeued_lost"
    for name in (*MoveCounter, *ResumeCounter):
        assert f"'{name}'" in SOURCE


@pytest.mark.parametrize("event", LedgerEvent)
def test_every_reader_knows_every_word(event: LedgerEvent) -> None:
    """A text in explain, a rule for spans; a row in the live view for what has a price."""
    assert event in explain._TEXTS
    assert event in tracing._RULES
    assert (event in view._KINDS) == (event in PRICED)


@pytest.mark.parametrize("event", PRICED)
def test_a_row_of_the_live_view_tells_the_kind(event: LedgerEvent) -> None:
    """With where it went and the prices."""
    move = RecentMove(at_ms=0, request_id="r", kind=event, source="a", target="b", benefit_ms=5, cost_ms=1)
    assert view._move(move, 9000, is_wide=True) == (
        "9 s ago",
        view._KINDS[event],
        "a → b",
        "gains 5 ms, costs 1 ms",
        "r",
    )


def test_a_word_of_another_release_stays_readable() -> None:
    """It has no event; its facts are kept."""
    line = parse_line(json.dumps({"what": "teleported", "at_ms": 7, "distance": 3}))
    assert (line.event, line.what, line.at_ms, line.facts) == (None, "teleported", 7, {"distance": 3})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"what": "lost"}', '{"what": "lost", "at_ms": null}'])
def test_what_is_no_line_is_a_value_error(text: str) -> None:
    """The readers catch that."""
    with pytest.raises(ValueError):
        parse_line(text)
