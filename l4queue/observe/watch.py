"""Repeated views of a deployment: the overview, ages of its queues, recent outcomes and moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from l4queue.observe.overview import Overview, read_overview
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.ledger import PRICED, LedgerEvent, LedgerLine, MoveCounter, parse_line
from l4queue.protocol.reads import FinishedRequest, Reads

__all__ = ("Look", "RecentMove", "Watch")

MAX_FINISHED = 2_000
"""Finished requests read in one look: of more, the latest."""
MAX_AGED = 32
"""Requests at the head of a queue whose waiting time is read."""
MAX_LEDGERS = 500
"""Requests whose ledgers are read for moves in one look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentMove:
    """One request that changed its worker or was taken from another stage's queue. `kind` is one of `PRICED`."""

    at_ms: int
    request_id: str
    kind: LedgerEvent
    source: str
    target: str
    benefit_ms: float
    cost_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Result of one look. Ages are by queue name, the inbox as `in`, of the requests at its head, ms."""

    overview: Overview
    ages_ms: dict[str, int]
    finished: tuple[FinishedRequest, ...]
    moves: tuple[RecentMove, ...]


class Watch:
    """Looks again and again. Reads only; what it reads is bounded, whatever the deployment does."""

    def __init__(self, executor: Executor, namespace: str) -> None:
        self._executor = executor
        self._namespace = namespace
        self._reads = Reads(Keys(namespace))
        self._finished_id: str | None = None
        self._num_moves = 0

    def look(self) -> Look:
        """Look now; the first look also tells what finished before it. ServiceUnavailable when Redis is away."""
        overview = read_overview(self._executor, self._namespace)
        last_id, finished = self._executor.run(self._reads.latest_finished(self._finished_id, count=MAX_FINISHED))
        look = Look(
            overview=overview,
            ages_ms=self._ages_ms(overview),
            finished=tuple(finished),
            moves=tuple(self._moves(overview, finished)),
        )
        self._finished_id = last_id
        return look

    def _ages_ms(self, overview: Overview) -> dict[str, int]:
        """How long the one that waits longest at the head of each queue has waited."""
        names = [name for name, queue in overview.queues.items() if queue.num_requests]
        queues = [self._reads.queue_ids(name, limit=MAX_AGED) for name in names]
        oldest, *heads = self._executor.run_many([self._reads.inbox_oldest(), *queues])
        calls = [self._reads.waiting_since_ms(request_id) for ids in heads for request_id in ids]
        accepted = [self._reads.submitted_ms(request_id) for request_id in oldest]
        found = self._executor.run_many([*accepted, *calls])
        inbox_ms, since = next(iter(found[: len(oldest)]), None), found[len(oldest) :]
        ages_ms = {} if inbox_ms is None else {"in": max(0, overview.now_ms - inbox_ms)}
        rest = iter(since)
        for name, ids in zip(names, heads, strict=True):
            known = [since_ms for _, since_ms in zip(ids, rest, strict=False) if since_ms is not None]
            if known:
                ages_ms[name] = max(0, overview.now_ms - min(known))
        return ages_ms

    def _moves(self, overview: Overview, finished: Iterable[FinishedRequest]) -> list[RecentMove]:
        """From the ledgers of running and of just finished requests, if the counts say that there are new ones.

        A request is told of again in the next look while it runs: a caller that keeps moves compares values.
        """
        num_moves = sum(overview.counts.get(name, 0) for name in MoveCounter)
        if num_moves == self._num_moves:
            return []
        held = self._executor.run_many([self._reads.held(worker.incarnation) for worker in overview.workers])
        ids = [request_id for ids in held for request_id in ids] + [row.request_id for row in finished]
        ids = ids[:MAX_LEDGERS]
        ledgers: list[list[str]] = self._executor.run_many([self._reads.ledger(request_id) for request_id in ids])
        self._num_moves = num_moves
        return [
            move
            for request_id, ledger in zip(ids, ledgers, strict=True)
            for line in ledger
            if (move := _move(request_id, line)) is not None
        ]


def _move(request_id: str, text: str) -> RecentMove | None:
    """The move that a ledger's line tells of, if it is one."""
    try:
        line = parse_line(text)
        return _told(request_id, line.event, line) if line.event in PRICED else None
    except (KeyError, TypeError, ValueError):  # another release tells it in other words
        return None


def _told(request_id: str, kind: LedgerEvent, line: LedgerLine) -> RecentMove:
    facts = line.facts
    taken = kind is LedgerEvent.STOLEN  # waiting in another stage's queue: then it is the worker that moved it
    return RecentMove(
        at_ms=line.at_ms,
        request_id=request_id,
        kind=kind,
        source=f"stage {facts['from']}" if taken else str(facts["worker"]),
        target=str(facts["worker"]) if taken else str(facts["to"]).removeprefix("@"),
        benefit_ms=float(facts["benefit_ms"]),
        cost_ms=float(facts["cost_ms"]),
    )
