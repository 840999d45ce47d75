"""End of a trace: the worker that sees a request end reports its whole life as spans.

The spans are made from the request's record and ledger, after the fact and on another thread. So they have one
clock (Redis's) and are whole even where a worker was killed. A worker has nothing to do for them while it
generates.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from l4queue.client.tracing import Exporting, context_of, explain_failure
from l4queue.config import Settings
from l4queue.errors import L4QueueError
from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.ledger import FAULTS, LEASE_ENDS, MOVES, TAKES, LedgerEvent, LedgerLine, parse_line
from l4queue.protocol.reads import Reads
from l4queue.protocol.records import RequestRecord
from workers.telemetry.observer import Observer, RequestView

__all__ = ("SpanSpec", "TraceSender", "build_spans", "open_traces")

log = logging.getLogger("l4queue.tracing")
_SERVICE = "l4queue-worker"
CAPACITY = 10_000
"""Most ended requests whose spans are still to be made; beyond it the oldest are dropped and counted."""
_BATCH = 64  # requests whose spans are exported at once
_RETRY_S = 1.0  # between two tries to reach Redis
_CLOSE_S = 1.0  # for the last export; a collector that is away delays no exit further
_MOVE_FACTS = ("benefit_ms", "cost_ms", "kv")


@dataclass(slots=True, kw_only=True)
class SpanSpec:
    """One span to be. `inside` is the index of the piece that it is a part of; None for the first, the request."""

    name: str
    start_ms: int
    end_ms: int
    inside: int | None = 0
    attributes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def build_spans(record: RequestRecord, ledger: Sequence[str]) -> list[SpanSpec]:
    """The life of a request that has ended, in pieces; each is after the one that it is a part of."""
    teller = _SpanBuilder(record)
    for line in ledger:
        try:
            teller.add(parse_line(line))
        except (KeyError, TypeError, ValueError):  # another release tells it in other words
            continue
    return teller.finish()


class _SpanBuilder:
    """Reads a ledger from its start. What is open is one of waiting, prefill, decode, and a move around it."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._end_ms = record.finished_ms or record.submitted_ms
        queued_ms = record.submitted_ms if record.queued_ms is None else record.queued_ms
        self._pieces = [
            SpanSpec(name="request", start_ms=record.submitted_ms, end_ms=self._end_ms, inside=None),
            SpanSpec(name="route", start_ms=record.submitted_ms, end_ms=queued_ms),
        ]
        self._phase, self._since_ms, self._worker = "wait", queued_ms, ""
        self._offset = 0
        self._has_taken, self._has_token = False, False
        self._move: int | None = None  # index of the hand-over that is under way

    def add(self, line: LedgerLine) -> None:
        """One line of the ledger. A word of another release ends no lease."""
        if line.event is not None:
            _RULES[line.event](self, line)

    def take(self, line: LedgerLine) -> None:
        """A lease begins."""
        self._take(line.at_ms, str(line.facts["worker"]))

    def resume(self, line: LedgerLine) -> None:
        """The first token of a lease that is not the first one."""
        self._first_token(line.at_ms)

    def stay(self, line: LedgerLine) -> None:
        """The request waits on, in whatever queue."""

    def leave(self, line: LedgerLine) -> None:
        """A lease ends before the request does."""
        at_ms, facts, event = line.at_ms, line.facts, LedgerEvent(line.what)
        self._catch_up(at_ms, str(facts["worker"]))
        self._close(at_ms, offset=int(facts["offset"]), error=FAULTS.get(event), ended_by=event.value)
        if event in MOVES:
            self._end_move(at_ms)
            told: dict[str, Any] = {name: facts[name] for name in _MOVE_FACTS if name in facts}
            told |= {"move": event.value, "from": facts["worker"], "to": str(facts["to"]).removeprefix("@")}
            self._move = len(self._pieces)
            self._pieces.append(SpanSpec(name="hand-over", start_ms=at_ms, end_ms=at_ms, attributes=told))
        self._phase, self._since_ms = "wait", at_ms

    def finish(self) -> list[SpanSpec]:
        """The end of the request ends what is open."""
        record = self._record
        self._catch_up(self._end_ms, record.worker or "")
        error = None
        if record.state is not RequestState.DONE:
            error = f"{record.state.value}: {record.error}" if record.error else record.state.value
        self._close(self._end_ms, offset=record.offset, error=error)
        self._end_move(self._end_ms)
        self._pieces[0].error = error
        return self._pieces

    def _catch_up(self, now_ms: int, worker: str) -> None:
        """Steps that leave no line: the first lease, and the first token where it was no resumption."""
        started_ms, token_ms = self._record.started_ms, self._record.first_token_ms
        if not self._has_taken and started_ms is not None:
            self._take(started_ms, worker)
        if self._phase == "prefill" and not self._has_token and token_ms is not None and token_ms <= now_ms:
            self._first_token(max(token_ms, self._since_ms))

    def _take(self, at_ms: int, worker: str) -> None:
        self._close(at_ms)
        self._phase, self._since_ms, self._worker, self._has_taken = "prefill", at_ms, worker, True

    def _first_token(self, at_ms: int) -> None:
        """The first of this lease."""
        self._close(at_ms)
        self._end_move(at_ms)
        self._phase, self._since_ms, self._has_token = "decode", at_ms, True

    def _end_move(self, at_ms: int) -> None:
        if self._move is not None:
            self._pieces[self._move].end_ms = at_ms
            self._move = None

    def _close(
        self, at_ms: int, *, offset: int | None = None, error: str | None = None, ended_by: str | None = None
    ) -> None:
        attributes: dict[str, Any] = {}
        if self._phase != "wait":
            attributes["worker"] = self._worker
        if self._phase == "prefill":
            attributes["context_tokens"] = (self._record.prompt_tokens or 0) + self._offset
        if offset is not None:
            if self._phase == "decode":
                attributes["tokens"] = offset - self._offset
            self._offset = offset
        if ended_by is not None:
            attributes["ended_by"] = ended_by
        piece = SpanSpec(
            name=self._phase, start_ms=self._since_ms, end_ms=at_ms, attributes=attributes, error=error
        )
        if self._phase != "decode":
            piece.inside = 0 if self._move is None else self._move
        self._pieces.append(piece)


_RULES: Mapping[LedgerEvent, Callable[[_SpanBuilder, LedgerLine], None]] = {
    **dict.fromkeys(TAKES, _SpanBuilder.take),
    **dict.fromkeys(LEASE_ENDS, _SpanBuilder.leave),
    LedgerEvent.RESUMED: _SpanBuilder.resume,
    LedgerEvent.REROUTED: _SpanBuilder.stay,
}


def open_traces(settings: Settings, observer: Observer) -> TraceSender | None:
    """The traces beside `observer`; None when they are off or cannot be sent, which is logged once."""
    if not settings.traces:
        return None
    try:
        exporting = Exporting(_SERVICE, instance=settings.worker_name)
    except Exception as error:  # whatever an OTEL_ variable may bring about: serving goes before
        log.warning("no traces from this worker: %s", explain_failure(error))
        return None
    return TraceSender(settings, observer, exporting)


class TraceSender:
    """An Observer around another: it notes the ids of traced requests that end; its thread does the rest."""

    def __init__(
        self, settings: Settings, observer: Observer, exporting: Exporting, *, capacity: int = CAPACITY
    ) -> None:
        self._observer = observer
        self._exporting = exporting
        self._namespace = settings.namespace
        self._reads = Reads(Keys(settings.namespace))
        self._executor = Executor(settings.redis_url, retry_s=_RETRY_S, max_connections=2, says_outages=True)
        self._ended: deque[str] = deque(maxlen=capacity)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="l4-traces", daemon=True)
        self.num_dropped = 0

    def start(self) -> None:
        """Start its thread."""
        self._thread.start()

    def close(self) -> None:
        """Send what there is, for a few seconds at most; safe to call twice."""
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)
        last = threading.Thread(target=self._exporting.close, name="l4-traces-end", daemon=True)
        last.start()
        last.join(2 * _CLOSE_S)
        self._executor.close()

    # -- Observer: called on the engine's event loop

    def request_started(self, view: RequestView) -> None:
        """Nothing of a trace is known to be worth keeping yet."""
        self._observer.request_started(view)

    def request_succeeded(self, view: RequestView, *, output_tokens: int, runtime_s: float, text: str) -> None:
        """Its life can be told."""
        self._observer.request_succeeded(view, output_tokens=output_tokens, runtime_s=runtime_s, text=text)
        self._put(view)

    def request_failed(self, view: RequestView, *, error: str, runtime_s: float) -> None:
        """Its life can be told."""
        self._observer.request_failed(view, error=error, runtime_s=runtime_s)
        self._put(view)

    def request_cancelled(self, view: RequestView) -> None:
        """Its life can be told."""
        self._observer.request_cancelled(view)
        self._put(view)

    def request_moved(self, view: RequestView, *, why: str) -> None:
        """Nothing to do: the end of the request tells of this too."""
        self._observer.request_moved(view, why=why)

    def _put(self, view: RequestView) -> None:
        if not view.is_traced:
            return
        if len(self._ended) == self._ended.maxlen:
            self.num_dropped += 1
        self._ended.append(view.request_id)
        self._wake.set()

    # -- the thread

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._ended:
                batch = [self._ended.popleft() for _ in range(min(_BATCH, len(self._ended)))]
                try:
                    self.send(batch)
                except L4QueueError as error:
                    log.debug("traces wait for Redis: %s", error)  # the executor has said so
                    self._ended.extendleft(reversed(batch))
                    if self._stopping.wait(_RETRY_S):
                        return
                except Exception:  # the edge of the loop: the next batch may be better
                    log.exception("no traces of %d requests", len(batch))
            if self._stopping.is_set():
                return

    def send(self, request_ids: Sequence[str]) -> None:
        """Read these requests and hand their spans over to be sent."""
        calls: list[Any] = [self._reads.record(request_id) for request_id in request_ids]
        calls += [self._reads.ledger(request_id) for request_id in request_ids]
        found = self._executor.run_many(calls)
        for record, ledger in zip(found[: len(request_ids)], found[len(request_ids) :], strict=True):
            if record is None or record.state not in TERMINAL:
                continue
            traceparent = record.body_fields.get("traceparent")
            if isinstance(traceparent, str):
                self._emit(record, traceparent, build_spans(record, ledger))

    def _emit(self, record: RequestRecord, traceparent: str, pieces: Sequence[SpanSpec]) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        tracer, spans = self._exporting.tracer, list[Any]()
        for piece in pieces:
            is_root = piece.inside is None
            own = _about(record, self._namespace) if is_root else _named(piece.attributes)
            spans.append(
                tracer.start_span(
                    piece.name,
                    context=context_of(traceparent) if is_root else set_span_in_context(spans[piece.inside or 0]),
                    kind=SpanKind.CONSUMER if is_root else SpanKind.INTERNAL,
                    attributes=own,
                    start_time=piece.start_ms * 1_000_000,
                )
            )
            if piece.error is not None:
                spans[-1].set_status(Status(StatusCode.ERROR, piece.error))
        for piece, span in zip(pieces, spans, strict=True):
            span.end(end_time=piece.end_ms * 1_000_000)


def _about(record: RequestRecord, namespace: str) -> dict[str, Any]:
    """Attributes of the request itself. No prompt, no output, none of the user's metadata."""
    facts: dict[str, Any] = {
        "messaging.system": "l4queue",
        "messaging.destination.name": namespace,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.offset,
        "gen_ai.request.max_tokens": record.max_tokens,
        "l4queue.request_id": record.request_id,
        "l4queue.state": record.state.value,
        "l4queue.stage": record.stage,
        "l4queue.plan": record.plan,
        "l4queue.worker": record.worker,
        "l4queue.leases": record.epoch,
        "l4queue.crashes": record.crashes,
    }
    if record.finish_reason:
        facts["gen_ai.response.finish_reasons"] = [record.finish_reason]
    return {name: value for name, value in facts.items() if value is not None}


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"l4queue.{name}": value for name, value in attributes.items()}
