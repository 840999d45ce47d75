"""Reads as values: records, outputs, plans, loads, counters. All harmless to repeat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from l4queue.models import WorkerLoad
from l4queue.policy.queue_order import BACKGROUND
from l4queue.protocol.calls import Call
from l4queue.protocol.keys import Keys
from l4queue.protocol.records import OutputEntry, RequestRecord

__all__ = (
    "DeadLetter",
    "FinishedRequest",
    "InboxBody",
    "Reads",
    "StreamEntry",
    "WorkerView",
    "load_from_json",
    "load_to_json",
    "parse_entries",
)

StreamEntry = tuple[bytes, dict[bytes, bytes]]
_BODY_FIELDS = ("state", "kind", "prompt", "body", "submitted_ms", "deadline_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxBody:
    """What a dispatcher reads of a submitted request."""

    state: str
    kind: str
    prompt: bytes
    body: bytes
    submitted_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker incarnation as Redis knows it."""

    incarnation: str
    worker_id: str
    expires_ms: int
    seen_ms: int
    load: WorkerLoad
    cost: dict[str, Any] | None
    price: dict[str, Any] | None


_LOAD_FIELDS = frozenset(field.name for field in fields(WorkerLoad))
_NEW_FIELDS = ("is_emptying", "can_empty")  # readers of an older release fail at unknown names in `load`


def load_to_json(load: WorkerLoad) -> dict[str, dict[str, Any]]:
    """`load` and `more` of what a worker publishes."""
    told = asdict(load)
    return {"more": {name: told.pop(name) for name in _NEW_FIELDS}, "load": told}


def load_from_json(told: Mapping[str, Any]) -> WorkerLoad:
    """The inverse, from any release: what is unknown here is left out, what is missing has its default."""
    known = {**told["load"], **told.get("more", {})}
    return WorkerLoad(**{name: value for name, value in known.items() if name in _LOAD_FIELDS})


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """The facts of one finished request, from the capped stream `finished`. Times are server ms."""

    request_id: str
    state: str
    prompt_tokens: int
    output_tokens: int
    submitted_ms: int
    started_ms: int | None
    first_token_ms: int | None
    finished_ms: int
    stage: str
    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A request that kills its worker, or an inbox entry that cannot be read (then with its bytes)."""

    request_id: str
    why: str
    raw: str
    at_ms: int


def parse_entries(reply: Any) -> list[StreamEntry]:
    """Entries of one stream from XRANGE, XREVRANGE or XAUTOCLAIM; deleted ones are left out."""
    return [(row[0], _pairs(row[1])) for row in reply if row is not None and row[1] is not None]


def _pairs(flat: Any) -> dict[bytes, bytes]:
    if isinstance(flat, Mapping):
        return dict(flat)
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _hash(reply: Any) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in _pairs(reply).items()}


def _outputs(reply: Any) -> list[OutputEntry]:
    return [OutputEntry.parse(entry_id, values) for entry_id, values in parse_entries(reply)]


def _finished(reply: Any) -> list[FinishedRequest]:
    rows = []
    for _, v in parse_entries(reply):
        rows.append(
            FinishedRequest(
                request_id=v[b"i"].decode(),
                state=v[b"s"].decode(),
                prompt_tokens=int(v[b"p"]),
                output_tokens=int(v[b"o"]),
                submitted_ms=int(v[b"a"]),
                started_ms=int(v[b"b"]) if v[b"b"] else None,
                first_token_ms=int(v[b"f"]) if v[b"f"] else None,
                finished_ms=int(v[b"d"]),
                stage=v[b"g"].decode(),
                worker=v[b"w"].decode(),
            )
        )
    return rows


def _dead_letters(reply: Any) -> list[DeadLetter]:
    return [
        DeadLetter(
            request_id=values[b"i"].decode(errors="replace"),
            why=values[b"why"].decode(errors="replace"),
            raw=values[b"bytes"].decode("latin-1"),
            at_ms=int(entry_id.partition(b"-")[0]),
        )
        for entry_id, values in parse_entries(reply)
    ]


def _body(row: list[Any]) -> InboxBody | None:
    if row[0] is None:
        return None
    state, kind, prompt, body, submitted_ms, _ = row
    return InboxBody(
        state=state.decode(),
        kind=(kind or b"").decode(),
        prompt=prompt or b"",
        body=body or b"{}",
        submitted_ms=int(submitted_ms or 0),
    )


class Reads:
    """Builders of all reads under one namespace."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def record(self, request_id: str) -> Call[RequestRecord | None]:
        """The facts of one request; None when unknown."""
        args = ("HMGET", self.keys.request(request_id), *RequestRecord.field_names())
        return Call(None, (), args, lambda row: RequestRecord.parse(request_id, row))

    def body(self, request_id: str) -> Call[InboxBody | None]:
        """Prompt and parameters of a submitted request; None when the record is gone."""
        return Call(None, (), ("HMGET", self.keys.request(request_id), *_BODY_FIELDS), _body)

    def output(self, request_id: str, *, after: int = 0) -> Call[list[OutputEntry]]:
        """Output entries beyond the first `after` tokens, in order, the end marker included."""
        start = f"({after}-0" if after else "-"
        return Call(None, (), ("XRANGE", self.keys.output(request_id), start, "+"), _outputs)

    def plan(self) -> Call[tuple[int, str | None]]:
        """Version and JSON of the current plan; (0, None) when none was published."""
        args = ("HMGET", self.keys.plan, "version", "body")
        return Call(None, (), args, lambda r: (int(r[0] or 0), r[1].decode() if r[1] else None))

    def plan_history(self, *, count: int) -> Call[list[tuple[int, int, str]]]:
        """The latest plans, newest first: (published ms, version, JSON)."""
        args = ("XREVRANGE", self.keys.plans, "+", "-", "COUNT", count)
        return Call(
            None,
            (),
            args,
            lambda r: [
                (int(i.partition(b"-")[0]), int(v[b"version"]), v[b"body"].decode()) for i, v in parse_entries(r)
            ],
        )

    def counts(self) -> Call[dict[str, str]]:
        """Totals since the beginning: live, live_tokens, submitted, done, failed, ..."""
        return Call(None, (), ("HGETALL", self.keys.counts), _hash)

    def backlog(self) -> Call[dict[str, str]]:
        """Waiting tokens by stage."""
        return Call(None, (), ("HGETALL", self.keys.backlog), _hash)

    def histogram(self) -> Call[dict[str, str]]:
        """Cumulative counters by length bucket: a: arrivals, p: prompt tokens, d: decode steps, c: context."""
        return Call(None, (), ("HGETALL", self.keys.hist), _hash)

    def planner_memory(self) -> Call[str | None]:
        """What the planner wrote down in its last round (JSON)."""
        return Call(None, (), ("GET", self.keys.memory), lambda r: r.decode() if r else None)

    def decisions(self, *, count: int) -> Call[list[tuple[int, str]]]:
        """The planner's latest decisions, newest first: (ms, JSON)."""
        args = ("XREVRANGE", self.keys.decisions, "+", "-", "COUNT", count)
        return Call(
            None, (), args, lambda r: [(int(i.partition(b"-")[0]), v[b"d"].decode()) for i, v in parse_entries(r)]
        )

    def prompt_tokens(self, request_id: str) -> Call[int | None]:
        """Counted prompt length of a request; None when unknown."""
        args = ("HGET", self.keys.request(request_id), "prompt_tokens")
        return Call(None, (), args, lambda r: None if r is None else int(r))

    def ledger(self, request_id: str) -> Call[list[str]]:
        """What befell a request out of the ordinary, in order: JSON lines, each with `at_ms` and `what`."""
        args = ("HGET", self.keys.request(request_id), "ledger")
        return Call(None, (), args, lambda r: r.decode().splitlines() if r else [])

    def routed_because(self, request_id: str) -> Call[str | None]:
        """Why a request was routed as it was (JSON); None when there was one stage only."""
        args = ("HGET", self.keys.request(request_id), "why")
        return Call(None, (), args, lambda r: r.decode() if r else None)

    def queue_length(self, stage: str) -> Call[int]:
        """Waiting requests of one stage."""
        return Call(None, (), ("ZCARD", self.keys.queue(stage)), int)

    def num_foreground(self, stage: str) -> Call[int]:
        """Waiting requests of one stage but for background ones."""
        args = ("ZCOUNT", self.keys.queue(stage), "-inf", f"({BACKGROUND:.0f}")
        return Call(None, (), args, int)

    def foreground_ms(self, stage: str) -> Call[int | None]:
        """When a request that is not background last came to this stage, by the server's clock, ms."""
        return Call(None, (), ("HGET", self.keys.foreground, stage), lambda r: None if r is None else int(r))

    def all_foreground_ms(self) -> Call[dict[str, int]]:
        """The same of every stage that one came to."""
        args = ("HGETALL", self.keys.foreground)
        return Call(None, (), args, lambda r: {stage: int(at_ms) for stage, at_ms in _hash(r).items()})

    def waiting_since_ms(self, request_id: str) -> Call[int | None]:
        """When a waiting request was queued, or given back or moved last, server ms; None when it has gone."""
        args = ("HMGET", self.keys.request(request_id), "moved_ms", "queued_ms")
        return Call(None, (), args, lambda r: next((int(v) for v in r if v), None))

    def num_held(self, incarnation: str) -> Call[int]:
        """Requests that a worker incarnation runs at this very moment; its published load is older."""
        return Call(None, (), ("SCARD", self.keys.held(incarnation)), int)

    def held(self, incarnation: str) -> Call[set[str]]:
        """Ids under this lease."""
        args = ("SMEMBERS", self.keys.held(incarnation))
        return Call(None, (), args, lambda reply: {member.decode() for member in reply})

    def queue_ids(self, stage: str, *, limit: int) -> Call[list[str]]:
        """The first waiting ids of a stage, in serving order."""
        args = ("ZRANGE", self.keys.queue(stage), 0, limit - 1)
        return Call(None, (), args, lambda r: [i.decode() for i in r])

    def inbox_oldest_ms(self) -> Call[int | None]:
        """When the oldest request that is not yet routed was accepted, server ms; None when there is none."""
        args = ("XRANGE", self.keys.inbox, "-", "+", "COUNT", 1)
        return Call(None, (), args, lambda r: _order(parse_entries(r)[0][0])[0] if parse_entries(r) else None)

    def inbox_length(self) -> Call[int]:
        """Requests accepted and not yet routed."""
        return Call(None, (), ("XLEN", self.keys.inbox), int)

    def incarnations(self) -> Call[list[tuple[str, int]]]:
        """Registered worker incarnations with the expiry of their lease, server ms."""
        return Call(None, (), ("ZRANGE", self.keys.workers, 0, -1, "WITHSCORES"), _scored)

    def worker(self, incarnation: str, expires_ms: int) -> Call[WorkerView | None]:
        """One worker's published load; None when it has just gone."""
        args = ("HMGET", self.keys.worker(incarnation), "worker", "load", "seen_ms")

        def parse(row: list[Any]) -> WorkerView | None:
            if row[0] is None:
                return None
            told = json.loads(row[1])
            return WorkerView(
                incarnation=incarnation,
                worker_id=row[0].decode(),
                expires_ms=expires_ms,
                seen_ms=int(row[2]),
                load=load_from_json(told),
                cost=told["cost"],
                price=told.get("price"),  # workers of an older release do not tell
            )

        return Call(None, (), args, parse)

    def finished(self, *, count: int) -> Call[list[FinishedRequest]]:
        """The latest finished requests, newest first."""
        return Call(None, (), ("XREVRANGE", self.keys.finished, "+", "-", "COUNT", count), _finished)

    def submitted_ms(self, request_id: str) -> Call[int | None]:
        """When a request was accepted, server ms; None when unknown."""
        args = ("HGET", self.keys.request(request_id), "submitted_ms")
        return Call(None, (), args, lambda r: None if r is None else int(r))

    def last_finished_id(self) -> Call[str]:
        """Stream id of the latest finished request, to be given to `finished_after`."""
        args = ("XREVRANGE", self.keys.finished, "+", "-", "COUNT", 1)
        return Call(None, (), args, lambda r: r[0][0].decode() if r else "0-0")

    def finished_after(self, last_id: str, *, count: int) -> Call[tuple[str, list[FinishedRequest]]]:
        """Requests that finished after the stream id, oldest first, and the id to go on from."""
        args = ("XRANGE", self.keys.finished, f"({last_id}", "+", "COUNT", count)
        return Call(None, (), args, lambda r: (r[-1][0].decode() if r else last_id, _finished(r)))

    def latest_finished(
        self, last_id: str | None, *, count: int
    ) -> Call[tuple[str | None, list[FinishedRequest]]]:
        """The latest of what finished after the stream id `last_id`, newest first, and the newest id."""
        start = "-" if last_id is None else f"({last_id}"
        args = ("XREVRANGE", self.keys.finished, "+", start, "COUNT", count)
        return Call(None, (), args, lambda r: (r[0][0].decode() if r else last_id, _finished(r)))

    def output_lengths(self, *, after: str | None, count: int = 500) -> Call[tuple[str | None, list[int]]]:
        """Output lengths of what finished after the stream id `after` (None: of the latest), and the last id."""
        args: tuple[str | int, ...] = ("XREVRANGE", self.keys.finished, "+", "-", "COUNT", count)
        if after is not None:
            args = ("XRANGE", self.keys.finished, f"({after}", "+", "COUNT", count)

        def parse(reply: Any) -> tuple[str | None, list[int]]:
            entries = parse_entries(reply)
            last = max((i for i, _ in entries), key=_order, default=None)
            lengths = [int(v[b"o"]) for _, v in entries if v[b"s"] == b"done"]
            return (after if last is None else last.decode(), lengths)

        return Call(None, (), args, parse)

    def dead_letters(self, *, count: int) -> Call[list[DeadLetter]]:
        """The latest dead letters, newest first."""
        return Call(None, (), ("XREVRANGE", self.keys.dead, "+", "-", "COUNT", count), _dead_letters)

    def server_time_ms(self) -> Call[int]:
        """The server's clock, ms since the epoch: the only clock of the protocol."""
        return Call(None, (), ("TIME",), lambda r: int(r[0]) * 1000 + int(r[1]) // 1000)


def _order(entry_id: bytes) -> tuple[int, int]:
    ms, _, sequence = entry_id.partition(b"-")
    return int(ms), int(sequence)


def _scored(reply: Any) -> list[tuple[str, int]]:
    if reply and isinstance(reply[0], (list, tuple)):
        return [(m.decode(), int(float(s))) for m, s in reply]
    return [(m.decode(), int(float(s))) for m, s in zip(reply[::2], reply[1::2], strict=True)]
