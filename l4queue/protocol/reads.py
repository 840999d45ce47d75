"""Reads as values: records, outputs, plans, loads, counters. All harmless to repeat.

What cannot be read is left out and reported (`l4queue.protocol.foreign`); no read fails for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from l4queue.compat import MAX_NUMBER, object_of
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol import parsing as views
from l4queue.protocol.calls import Call
from l4queue.protocol.foreign import each, or_else, text
from l4queue.protocol.keys import Keys
from l4queue.protocol.packed import cut, entries_of
from l4queue.protocol.parsing import (
    DeadLetter,
    FinishedRequest,
    InboxBody,
    StreamEntry,
    WorkerView,
    order,
    parse_entries,
    whole,
)
from l4queue.protocol.records import OutputEntry, RequestRecord

__all__ = (
    "DeadLetter",
    "FinishedRequest",
    "InboxBody",
    "Reads",
    "StreamEntry",
    "WorkerView",
    "parse_entries",
)

T = TypeVar("T")
_NEVER_MS = "18446744073709551615"  # the last of all stream ids: nothing can follow it


class Reads:
    """Builders of all reads under one namespace."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def _read(self, args: tuple[Any, ...], parse: Callable[[Any], T], default: Callable[[], T]) -> Call[T]:
        """A plain command whose reply is reported where it cannot be read; then there is the default."""
        return Call(None, (), args, or_else(args[1], parse, default))

    def _entries(self, args: tuple[Any, ...], parse: Callable[[bytes, Any], T]) -> Call[list[T]]:
        """The readable entries of a stream."""
        return Call(None, (), args, lambda r: each(args[1], parse_entries(r), parse))

    def _number(self, *args: Any) -> Call[int | None]:
        """One field that is a number; None where there is none."""
        return self._read(args, lambda r: None if r is None else whole(r), _none)

    def _text(self, *args: Any) -> Call[str | None]:
        """One text; None where there is none."""
        return self._read(args, lambda r: r.decode() if r else None, _none)

    def record(self, request_id: str) -> Call[RequestRecord | None]:
        """The facts of one request; None when unknown."""
        args = ("HMGET", self.keys.request(request_id), *RequestRecord.field_names())
        return self._read(args, lambda row: RequestRecord.parse(request_id, row), _none)

    def body(self, request_id: str) -> Call[InboxBody | None]:
        """Prompt and parameters of a submitted request; None when the record is gone."""
        return Call(None, (), ("HMGET", self.keys.request(request_id), *views.BODY_FIELDS), views.body)

    def output(self, request_id: str, *, after: int = 0) -> Call[list[OutputEntry]]:
        """Output entries beyond the first `after` tokens, in order, the end marker included; packed or not.

        Empty although the request has ended: its output has expired, or was dropped for want of room.
        """
        key, start = self.keys.output(request_id), f"({after}-0" if after else "-"

        def read(reply: Any) -> list[OutputEntry]:
            entries = _output(key, parse_entries(reply))
            return [entry for entry in entries if entry.upto > after or entry.state is not None]

        return Call(None, (), ("XRANGE", key, start, "+"), read)

    def ended(self, request_id: str) -> Call[tuple[RequestRecord | None, list[OutputEntry]]]:
        """The record and the output of a request that ended well a moment ago, by one command.

        The end of an output tells what the record says, until it is packed; None where it does not.
        """
        key = self.keys.output(request_id)
        told = or_else(key, partial(RequestRecord.told, request_id), _none)

        def read(reply: Any) -> tuple[RequestRecord | None, list[OutputEntry]]:
            rows = parse_entries(reply)
            return told(rows[-1][1]) if rows else None, _output(key, rows)

        return Call(None, (), ("XRANGE", key, "-", "+"), read)

    def plan(self) -> Call[tuple[int, str | None]]:
        """Version and JSON of the current plan; (0, None) when none was published, (0, "") for none of ours."""
        args = ("HMGET", self.keys.plan, "version", "body")
        return self._read(args, views.plan, lambda: (0, ""))

    def plan_history(self, *, count: int) -> Call[list[tuple[int, int, str]]]:
        """The latest plans, newest first: (published ms, version, JSON)."""
        args = ("XREVRANGE", self.keys.plans, "+", "-", "COUNT", count)
        return self._entries(args, views.published)

    def _figures(self, key: str, *, least: float = -MAX_NUMBER) -> Call[dict[str, str]]:
        return Call(None, (), ("HGETALL", key), partial(views.figures, key, least=least))

    def counts(self) -> Call[dict[str, str]]:
        """Totals since the beginning: live, live_tokens, submitted, done, failed, ..."""
        return self._figures(self.keys.counts)

    def backlog(self) -> Call[dict[str, str]]:
        """Waiting tokens by stage."""
        return self._figures(self.keys.backlog)

    def histogram(self) -> Call[dict[str, str]]:
        """Cumulative counters by length bucket: a: arrivals, p: prompt tokens, d: decode steps, c: context."""
        return self._figures(self.keys.hist, least=0.0)

    def planner_memory(self) -> Call[str | None]:
        """The planner's memory of its last round (JSON)."""
        return self._text("GET", self.keys.memory)

    def decisions(self, *, count: int) -> Call[list[tuple[int, str]]]:
        """The planner's latest decisions, newest first: (ms, JSON)."""
        args = ("XREVRANGE", self.keys.decisions, "+", "-", "COUNT", count)
        return self._entries(args, lambda i, v: (order(i)[0], v[b"d"].decode()))

    def prompt_tokens(self, request_id: str) -> Call[int | None]:
        """Counted prompt length of a request; None when unknown."""
        return self._number("HGET", self.keys.request(request_id), "prompt_tokens")

    def ledger(self, request_id: str) -> Call[list[str]]:
        """The ledger of a request, in order: JSON lines, each with `at_ms` and `what`."""
        args = ("HMGET", self.keys.request(request_id), *cut("ledger"))
        return Call(None, (), args, lambda r: views.ledger_lines(args[1], b"".join(filter(None, r))))

    def routed_because(self, request_id: str) -> Call[str | None]:
        """Why a request was routed as it was (JSON); None when there was one stage only."""
        args = ("HMGET", self.keys.request(request_id), *cut("why"))

        def read(reply: Any) -> str | None:
            whole_text = b"".join(filter(None, reply))
            return text(whole_text) if whole_text and object_of(whole_text, what="why") else None

        return self._read(args, read, _none)

    def queue_length(self, stage: str) -> Call[int]:
        """Waiting requests of one stage."""
        return Call(None, (), ("ZCARD", self.keys.queue(stage)), int)

    def num_foreground(self, stage: str) -> Call[int]:
        """Waiting requests of one stage but for background ones."""
        args = ("ZCOUNT", self.keys.queue(stage), "-inf", f"({BACKGROUND:.0f}")
        return Call(None, (), args, int)

    def foreground_ms(self, stage: str) -> Call[int | None]:
        """When a request that is not background last came to this stage, by the server's clock, ms."""
        return self._number("HGET", self.keys.foreground, stage)

    def all_foreground_ms(self) -> Call[dict[str, int]]:
        """The same of every stage that one came to."""
        key = self.keys.foreground
        return Call(
            None,
            (),
            ("HGETALL", key),
            lambda r: {stage: int(float(at_ms)) for stage, at_ms in views.figures(key, r).items()},
        )

    def waiting_since_ms(self, request_id: str) -> Call[int | None]:
        """When a waiting request was queued, or given back or moved last, server ms; None when it has gone."""
        args = ("HMGET", self.keys.request(request_id), "moved_ms", "queued_ms")
        return self._read(args, lambda r: next((whole(v) for v in r if v), None), _none)

    def num_held(self, incarnation: str) -> Call[int]:
        """Requests that a worker incarnation runs at this very moment; its published load is older."""
        return Call(None, (), ("SCARD", self.keys.held(incarnation)), int)

    def held(self, incarnation: str) -> Call[set[str]]:
        """Ids under this lease."""
        args = ("SMEMBERS", self.keys.held(incarnation))
        return Call(None, (), args, lambda reply: {text(member) for member in reply})

    def queue_ids(self, stage: str, *, limit: int) -> Call[list[str]]:
        """The first waiting ids of a stage, in serving order."""
        args = ("ZRANGE", self.keys.queue(stage), 0, limit - 1)
        return Call(None, (), args, lambda r: [text(i) for i in r])

    def inbox_oldest(self) -> Call[list[str]]:
        """Id of the oldest request that is not yet routed, if there is one.

        When it was accepted says its record: ids of entries go on from the last one when the clock goes back.
        """
        args = ("XRANGE", self.keys.inbox, "-", "+", "COUNT", 1)
        return Call(None, (), args, lambda r: [text(v.get(b"i", b"")) for _, v in parse_entries(r)])

    def inbox_ids(self, *, limit: int) -> Call[list[str]]:
        """The oldest requests that are not yet routed."""
        args = ("XRANGE", self.keys.inbox, "-", "+", "COUNT", limit)
        return Call(None, (), args, lambda r: [text(v.get(b"i", b"")) for _, v in parse_entries(r)])

    def inbox_length(self) -> Call[int]:
        """Requests accepted and not yet routed."""
        return Call(None, (), ("XLEN", self.keys.inbox), int)

    def incarnations(self) -> Call[list[tuple[str, int]]]:
        """Registered worker incarnations with the expiry of their lease, server ms."""
        return Call(None, (), ("ZRANGE", self.keys.workers, 0, -1, "WITHSCORES"), views.scored)

    def worker(self, incarnation: str, expires_ms: int) -> Call[WorkerView | None]:
        """One worker's published load; None when it has just gone, or cannot be read."""
        key = self.keys.worker(incarnation)
        parse = partial(views.worker, incarnation, expires_ms, key)
        return self._read(("HMGET", key, "worker", "load", "seen_ms"), parse, _none)

    def finished(self, *, count: int) -> Call[list[FinishedRequest]]:
        """The latest finished requests, newest first."""
        return self._entries(("XREVRANGE", self.keys.finished, "+", "-", "COUNT", count), views.finished_one)

    def submitted_ms(self, request_id: str) -> Call[int | None]:
        """When a request was accepted, server ms; None when unknown."""
        return self._number("HGET", self.keys.request(request_id), "submitted_ms")

    def last_finished_id(self) -> Call[str]:
        """Stream id of the latest finished request, to be given to `finished_after`."""
        args = ("XREVRANGE", self.keys.finished, "+", "-", "COUNT", 1)
        return Call(None, (), args, lambda r: r[0][0].decode() if r else "0-0")

    def finished_after(self, last_id: str, *, count: int) -> Call[tuple[str, list[FinishedRequest]]]:
        """Requests that finished after the stream id, oldest first, and the id to go on from."""
        args = ("XRANGE", self.keys.finished, _after(last_id), "+", "COUNT", count)
        return Call(None, (), args, lambda r: (r[-1][0].decode() if r else last_id, self._finished(r)))

    def latest_finished(
        self, last_id: str | None, *, count: int
    ) -> Call[tuple[str | None, list[FinishedRequest]]]:
        """The latest of what finished after the stream id `last_id`, newest first, and the newest id."""
        start = "-" if last_id is None else _after(last_id)
        args = ("XREVRANGE", self.keys.finished, "+", start, "COUNT", count)
        return Call(None, (), args, lambda r: (r[0][0].decode() if r else last_id, self._finished(r)))

    def _finished(self, reply: Any) -> list[FinishedRequest]:
        return each(self.keys.finished, parse_entries(reply), views.finished_one)

    def output_lengths(self, *, after: str | None, count: int = 500) -> Call[tuple[str | None, list[int]]]:
        """Output lengths of what finished after the stream id `after` (None: of the latest), and the last id."""
        args: tuple[str | int, ...] = ("XREVRANGE", self.keys.finished, "+", "-", "COUNT", count)
        if after is not None:
            args = ("XRANGE", self.keys.finished, _after(after), "+", "COUNT", count)

        def parse(reply: Any) -> tuple[str | None, list[int]]:
            entries = parse_entries(reply)
            last = max((i for i, _ in entries), key=order, default=None)
            rows = each(self.keys.finished, entries, lambda _, v: whole(v[b"o"]) if v[b"s"] == b"done" else None)
            lengths = [length for length in rows if length is not None]
            return (after if last is None else last.decode(), lengths)

        return Call(None, (), args, parse)

    def dead_letters(self, *, count: int) -> Call[list[DeadLetter]]:
        """The latest dead letters, newest first."""
        return self._entries(("XREVRANGE", self.keys.dead, "+", "-", "COUNT", count), views.dead_letter)

    def server_time_ms(self) -> Call[int]:
        """The server's clock, ms since the epoch: the only clock of the protocol."""
        return Call(None, (), ("TIME",), lambda r: int(r[0]) * 1000 + int(r[1]) // 1000)


def _output(key: str, rows: list[StreamEntry]) -> list[OutputEntry]:
    """The readable entries of an output stream, packed or not."""
    return [entry for part in each(key, rows, entries_of) for entry in part]


def _none() -> None:
    return None


def _after(last_id: str) -> str:
    """Where a range begins that follows an entry; from the start where nothing could follow it."""
    return "-" if last_id.startswith(_NEVER_MS) else f"({last_id}"
