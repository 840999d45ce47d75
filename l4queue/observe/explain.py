"""The timeline of one request, told from its record, its routing reason and its ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from l4queue.protocol.ledger import LedgerEvent, LedgerLine, parse_line
from l4queue.protocol.records import RequestRecord

__all__ = ("Event", "tell")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. `what` is a word for programs, `text` a line for people, `at_ms` server time."""

    at_ms: int
    what: str
    text: str
    facts: dict[str, Any]


def tell(record: RequestRecord, *, why: str | None, ledger: Sequence[str]) -> tuple[Event, ...]:
    """The timeline of a request, oldest first. Ordinary steps come from the times in its record."""
    lines = [parse_line(line) for line in ledger]
    head = lines[0] if lines else None
    first = record.worker if head is None or head.event is LedgerEvent.REROUTED else head.facts.get("worker")
    events = [_accepted(record)]
    if record.queued_ms is not None:
        events.append(_routed(record, record.queued_ms, json.loads(why) if why else {}))
    if record.started_ms is not None and not (head and head.event is LedgerEvent.STOLEN):
        events.append(_taken(record, record.started_ms, first))
    if record.first_token_ms is not None:
        events.append(_first_token(record, record.first_token_ms))
    for line in lines:
        events.append(Event(at_ms=line.at_ms, what=line.what, text=_text_of(line), facts=line.facts))
    if record.finished_ms is not None:
        events.append(_ended(record, record.finished_ms))
    return tuple(sorted(events, key=lambda event: event.at_ms))  # stable: equal times keep this order


def _accepted(record: RequestRecord) -> Event:
    facts: dict[str, Any] = {}
    if record.deadline_ms is not None:
        facts["deadline_ms"] = record.deadline_ms - record.submitted_ms
    text = "accepted" + (f", to be done within {facts['deadline_ms']} ms" if facts else "")
    return Event(at_ms=record.submitted_ms, what="accepted", text=text, facts=facts)


def _routed(record: RequestRecord, at_ms: int, why: dict[str, Any]) -> Event:
    facts = {"prompt_tokens": record.prompt_tokens, "max_tokens": record.max_tokens, "plan": record.plan, **why}
    text = f"counted: {record.prompt_tokens} prompt tokens, at most {record.max_tokens} to generate"
    if why:
        text += f"; plan {record.plan}: stage {why.get('stage')} ({why.get('reason')})"
        others = why.get("alternatives")
        drains = [
            f"{other.get('stage')} ({_drain(other)})"
            for other in (others if isinstance(others, list) else ())
            if isinstance(other, dict)
        ]
        text += f", drains in {_drain(why)}; else stage {', '.join(drains)}" if drains else ""
    else:
        text += f"; plan {record.plan} has one stage"
    return Event(at_ms=at_ms, what="routed", text=text, facts=facts)


def _drain(stage: dict[str, Any]) -> str:
    drain_ms = stage.get("drain_ms")
    return f"{drain_ms:.0f} ms" if isinstance(drain_ms, int | float) else "load unknown"


def _taken(record: RequestRecord, at_ms: int, worker: Any) -> Event:
    facts, text = {"worker": worker}, f"taken by {worker}"
    if record.placed is not None and not record.was_resumed:  # else it is the reason of a later lease
        facts["reason"] = record.placed
        text += f": {record.placed}"
    return Event(at_ms=at_ms, what="taken", text=text, facts=facts)


def _first_token(record: RequestRecord, at_ms: int) -> Event:
    facts: dict[str, Any] = {"ttft_ms": record.ttft_ms}
    text = f"first token, {record.ttft_ms} ms after it was accepted"
    if record.cached_tokens is not None:
        facts["cached_tokens"] = record.cached_tokens
        text += f"; {record.cached_tokens} of {record.prompt_tokens} prompt tokens were in the prefix cache"
    return Event(at_ms=at_ms, what="first token", text=text, facts=facts)


def _ended(record: RequestRecord, at_ms: int) -> Event:
    text = f"{record.state.value}: {record.offset} tokens"
    text += f", {record.finish_reason}" if record.finish_reason else ""
    text += f" ({record.error})" if record.error else ""
    facts = {"output_tokens": record.offset, "finish_reason": record.finish_reason, "error": record.error}
    return Event(at_ms=at_ms, what=record.state.value, text=text, facts=facts)


def _moved(kind: str, facts: dict[str, Any]) -> str:
    with_kv = "with its KV cache" if facts.get("kv") else "to be prefilled again"
    way = f"from {facts['worker']} to {facts['to'].removeprefix('@')} after {facts['offset']} tokens"
    return (
        f"{kind} {way}, {with_kv}: predicted benefit {facts['benefit_ms']:.0f} ms, cost {facts['cost_ms']:.0f} ms"
    )


def _stolen(facts: dict[str, Any]) -> str:
    return (
        f"stolen while waiting for stage {facts['from']} by {facts['worker']} of stage {facts['to']}:"
        f" predicted benefit {facts['benefit_ms']:.0f} ms, cost {facts['cost_ms']:.0f} ms"
    )


def _back(why: str, facts: dict[str, Any]) -> str:
    return f"back to queue {facts['to']} after {facts['offset']} tokens: {why} {facts['worker']}"


def _rerouted(facts: dict[str, Any]) -> str:
    if "pardoned" in facts:
        came_back = f"{facts['pardoned']} came back: its loss is blamed on it no longer"
        way = f"; moved from queue {facts['from']} to stage {facts['to']}" if facts["from"] != facts["to"] else ""
        return f"{came_back}, crashes left: {facts['crashes']}{way}"
    return f"moved from queue {facts['from']} to stage {facts['to']}: a new plan, or nobody served it"


_TEXTS: dict[LedgerEvent, Callable[[dict[str, Any]], str]] = {
    LedgerEvent.HANDOVER: lambda f: _moved("hand-over", f),
    LedgerEvent.ESCAPE: lambda f: _moved("away from a prefill,", f),
    LedgerEvent.STEAL: lambda f: _moved("stolen while running", f),
    LedgerEvent.STOLEN: _stolen,
    LedgerEvent.TAKEN: lambda f: f"taken by {f['worker']} from queue {f['from']}",
    LedgerEvent.RESUMED: lambda f: f"goes on after {f['gap_ms']:.0f} ms without a token",
    LedgerEvent.REROUTED: _rerouted,
    LedgerEvent.LOST: lambda f: _back("the lease ran out of", f),
    LedgerEvent.CRASHED: lambda f: _back("engine died in", f),
    LedgerEvent.RELEASED: lambda f: _back("given back by", f),
    LedgerEvent.LEFT: lambda f: _back("it left:", f),
    LedgerEvent.REPAIRED: lambda f: _back("no lease was found (alarm) at", f),
}


def _text_of(line: LedgerLine) -> str:
    """The line for people; the bare facts of a line that another release wrote in its own way."""
    if line.event is not None:
        try:
            return _TEXTS[line.event](line.facts)
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
    return f"{line.what}: {', '.join(f'{name} {value}' for name, value in line.facts.items())}"
