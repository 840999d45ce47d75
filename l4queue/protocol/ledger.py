"""Ledger of a request: the words that scripts write, the groups that readers need, and the counters beside them.

A line is a JSON object with `what`, `at_ms` (server time) and further facts. Scripts write the words as literals;
`tests/unit/protocol/test_ledger.py` holds them and all readers against `LedgerEvent`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = (
    "FAULTS",
    "LEASE_ENDS",
    "MOVES",
    "PRICED",
    "REQUEUES",
    "TAKES",
    "LedgerEvent",
    "LedgerLine",
    "MoveCounter",
    "ResumeCounter",
    "parse_line",
    "requeue_counter",
)


class LedgerEvent(StrEnum):
    """A word `what` of this release. Each is part of the wire format: fleets of two releases serve together."""

    #: given to a worker of a longer stage; `MoveKind.HANDOVER`, release
    HANDOVER = "hand-over"
    #: given to another worker, away from a long prefill; `MoveKind.ESCAPE`, release
    ESCAPE = "escape"
    #: given to a worker that asked for it while it ran; `MoveKind.STEAL`, release
    STEAL = "steal"
    #: taken from another stage's queue while it waited; take
    STOLEN = "stolen"
    #: leased again, after a first lease that leaves no line; take
    TAKEN = "taken"
    #: first token after it had gone back to a queue; emit, settle
    RESUMED = "resumed"
    #: put into the queue of another stage (migrate); with a fact `pardoned` blame was taken back (pardon)
    REROUTED = "rerouted"
    #: the lease of its worker ran out; reap
    LOST = "lost"
    #: the engine died in its worker; release with blame
    CRASHED = "crashed"
    #: given back by its worker; release
    RELEASED = "released"
    #: its worker left for good; retire
    LEFT = "left"
    #: it had no lease, an alarm; repair
    REPAIRED = "repaired"


MOVES = (LedgerEvent.HANDOVER, LedgerEvent.ESCAPE, LedgerEvent.STEAL)
"""Moves of a running request, each an end of a lease."""

PRICED = (*MOVES, LedgerEvent.STOLEN)
"""Events with a predicted `benefit_ms` and `cost_ms`: rows of the live view."""

REQUEUES = (
    LedgerEvent.LOST,
    LedgerEvent.CRASHED,
    LedgerEvent.LEFT,
    LedgerEvent.RELEASED,
    LedgerEvent.REPAIRED,
)
"""Ends of a lease that are no moves: the running request went back to a queue."""

LEASE_ENDS = (*MOVES, *REQUEUES)
"""Events that end a lease before the request does; their facts are `worker`, `to` and `offset`."""

TAKES = (LedgerEvent.TAKEN, LedgerEvent.STOLEN)
"""Events that begin a lease."""

FAULTS: Mapping[LedgerEvent, str] = {
    LedgerEvent.LOST: "its worker was lost",
    LedgerEvent.CRASHED: "its engine died",
    LedgerEvent.REPAIRED: "no lease was found",
}
"""Ends of a lease that are failures, with the error that a trace shows."""


class MoveCounter(StrEnum):
    """A field of `counts` that grows with the priced events."""

    HANDOVERS = "handovers"  # hand-overs and escapes
    STEALS_WAITING = "steals_waiting"  # stolen
    STEALS_RUNNING = "steals_running"  # steal


class ResumeCounter(StrEnum):
    """A field of `counts` that grows with `resumed`."""

    RESUMES = "resumes"
    GAP_MS = "resume_gap_ms"  # sum of the times without a token


def requeue_counter(event: LedgerEvent) -> str:
    """The field of `counts` that grows with an end of a lease."""
    return f"requeued_{event}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLine:
    """One line: `event` is None for a word of another release, which `what` has as text. `facts` are the rest."""

    what: str
    event: LedgerEvent | None
    at_ms: int
    facts: dict[str, Any]


def parse_line(text: str) -> LedgerLine:
    """Read one line that `Reads.ledger` has returned. ValueError where it has no time or no word."""
    facts = json.loads(text)
    try:
        what, at_ms = str(facts.pop("what")), int(facts.pop("at_ms"))
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"a ledger line has no `what` and `at_ms`: {text:.80}") from error
    event = LedgerEvent(what) if what in LedgerEvent.__members__.values() else None
    return LedgerLine(what=what, event=event, at_ms=at_ms, facts=facts)
