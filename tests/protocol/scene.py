"""A deployment in miniature under one namespace: short verbs for every transition, dumps for comparison."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import redis

from l4queue.models import RequestState
from l4queue.policy.admission import unbounded_budget
from l4queue.protocol.calls import Calls, Reaped, SubmitReply, Taken, Taker, Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import SOLO_STAGE, Keys
from l4queue.protocol.readiness import Readiness
from l4queue.protocol.reads import Reads
from l4queue.protocol.records import Grant, Outcome, OutputEntry, RequestRecord
from l4queue.protocol.retention import Evicted, Packed, Retention

__all__ = ("PROMPT_TOKENS", "Scene")

PROMPT_TOKENS = 3
_VOLATILE = frozenset({b"seen_ms"})
_LONG_AGO_MS = 1


class Scene:
    """Verbs with defaults: request `a`, worker `w1`, stage `0`. `raw` is for what no script would do."""

    def __init__(self, executor: Executor, namespace: str) -> None:
        self.executor = executor
        self.keys = Keys(namespace)
        self.calls = Calls(self.keys)
        self.keeping = Retention(self.keys)
        self.reads = Reads(self.keys)
        self.raw: Any = redis.Redis.from_url(executor.url, single_connection_client=True)
        self._nonces = itertools.count()
        self._beats = itertools.count()
        self._groups = False

    # the client ---------------------------------------------------------------------------------
    def submit(self, request_id: str = "a", **over: Any) -> SubmitReply:
        given: dict[str, Any] = {
            "digest": "",
            "body": "{}",
            "kind": "p",
            "prompt": b"hello",
            "charge_tokens": 10,
            "max_live_tokens": 1000,
            "max_live_bytes": 10**8,
            "deadline_ms": 0,
            "ttl_ms": 60_000,
            "client_id": "c1",
        }
        return self.executor.run(self.calls.submit(request_id, **(given | over)))

    def cancel(self, request_id: str = "a") -> tuple[Verdict, str | None]:
        return self.executor.run(self.calls.cancel(request_id, reason="asked to"))

    # the dispatcher -----------------------------------------------------------------------------
    def entry(self, request_id: str = "a") -> str:
        """Id of this request's inbox entry; an id that no entry has when it is gone."""
        for entry_id, values in self.raw.xrange(self.keys.inbox):
            if values[b"i"] == request_id.encode():
                return str(entry_id.decode())
        return "1-1"

    def read_inbox(self, consumer: str = "d1") -> list[tuple[str, str]]:
        """Entries as a dispatcher reads them: (entry id, request id)."""
        if not self._groups:
            self.raw.xgroup_create(self.keys.inbox, "d", id="0", mkstream=True)
            self._groups = True
        reply = self.raw.xreadgroup("d", consumer, {self.keys.inbox: ">"}, count=100)
        rows = reply.values() if isinstance(reply, dict) else [rows for _, rows in reply]
        flat = [entry for part in rows for entry in (part[0] if isinstance(reply, dict) else part)]
        return [(entry_id.decode(), values[b"i"].decode()) for entry_id, values in flat]

    def route(self, request_id: str = "a", *, entry: str | None = None, **over: Any) -> Verdict:
        given: dict[str, Any] = {
            "stage": "0",
            "score": 1.0,
            "token_ids": list(range(PROMPT_TOKENS)),
            "max_tokens": 8,
            "plan_version": 0,
            "bucket": 2,
        }
        where = entry or self.entry(request_id)
        return self.executor.run(self.calls.route(request_id, entry_id=where, **(given | over)))

    def refuse(self, request_id: str = "a", *, entry: str | None = None, raw: bytes = b"") -> Verdict:
        where = entry or self.entry(request_id)
        call = self.calls.refuse(request_id, entry_id=where, error="too long", field="prompt", raw=raw)
        return self.executor.run(call)

    # a worker -----------------------------------------------------------------------------------
    def renew(self, worker: str = "w1", *, register: bool = False, **over: Any) -> Verdict:
        given: dict[str, Any] = {"worker_id": worker, "lease_ms": 60_000, "load": "{}"}
        given["sequence"] = next(self._beats)
        return self.executor.run(self.calls.renew(worker, register=register, **(given | over)))

    def register(self, worker: str = "w1", **over: Any) -> Verdict:
        return self.renew(worker, register=True, **over)

    def take(
        self, worker: str = "w1", stage: str = "0", *, nonce: str = "", own_stage: str | None = None, **over: Any
    ) -> Taken:
        """Up to `max_requests` whatever their size, unless a budget says otherwise."""
        budget = unbounded_budget(over.pop("max_requests", 10), reason="test", is_idle=over.pop("is_idle", True))
        nonce = nonce or f"n{next(self._nonces)}"
        taker = Taker(worker_id=worker, incarnation=worker, stage=stage if own_stage is None else own_stage)
        call = self.calls.take(stage, taker=taker, nonce=nonce, **({"budget": budget} | over))
        return self.executor.run(call)

    def be_ready(self, worker: str = "w1", *, is_by_choice: bool = False, **over: Any) -> Taken:
        """Register, unless it did, and look: nothing runs there, and the next arrival may come with a wake-up."""
        if self.raw.zscore(self.keys.workers, worker) is None:
            self.register(worker)
        readiness = Readiness(
            backlog_ms=over.pop("backlog_ms", 0.0),
            request_ms=1.0,
            token_ms=0.5,
            may_steal=True,
            is_by_choice=is_by_choice,
        )
        return self.take(worker, readiness=readiness, **over)

    def grant(self, worker: str = "w1", stage: str = "0", **over: Any) -> Grant:
        """Take exactly one request."""
        taken = self.take(worker, stage, max_requests=1, **over)
        assert taken.verdict is Verdict.OK
        assert len(taken.grants) == 1
        return taken.grants[0]

    def emit(
        self, request_id: str = "a", worker: str = "w1", epoch: int = 1, offset: int = 0, num: int = 2
    ) -> Verdict:
        """Emit `num` tokens whose ids tell epoch and position, so that any change shows."""
        ids = self.tokens(epoch, offset, num)
        text = "".join(f"{i}," for i in ids)
        call = self.calls.emit(
            request_id, incarnation=worker, epoch=epoch, offset=offset, token_ids=ids, text=text
        )
        return self.executor.run(call)

    def settle(
        self,
        request_id: str = "a",
        worker: str = "w1",
        epoch: int = 1,
        offset: int = 0,
        num: int = 0,
        state: RequestState = RequestState.DONE,
        *,
        blocks: Sequence[bytes] = (),
    ) -> Verdict:
        outcome = Outcome(state=state, finish_reason="stop", held_text="end")
        ids = self.tokens(epoch, offset, num)
        call = self.calls.settle(
            request_id,
            incarnation=worker,
            epoch=epoch,
            offset=offset,
            token_ids=ids,
            text="".join(f"{i}," for i in ids),
            outcome=outcome,
            blocks=blocks,
        )
        return self.executor.run(call)

    def release(self, request_id: str = "a", worker: str = "w1", epoch: int = 1, **over: Any) -> Verdict:
        return self.executor.run(self.calls.release(request_id, incarnation=worker, epoch=epoch, **over))

    def extend(self, worker: str = "w1", *, lease_ms: int = 60_000) -> Verdict:
        return self.executor.run(self.calls.extend(worker, lease_ms=lease_ms))

    def pardon(self, worker: str = "w1", *guilty: str) -> Verdict:
        """The worker comes back and has not died."""
        return self.executor.run(self.calls.pardon(worker, worker_id=worker, guilty=guilty))

    def retire(self, worker: str = "w1") -> Verdict:
        return self.executor.run(self.calls.retire(worker))

    # upkeep -------------------------------------------------------------------------------------
    def lapse(self, worker: str = "w1") -> None:
        """Let the worker's lease have ended long ago."""
        self.raw.zadd(self.keys.workers, {worker: _LONG_AGO_MS}, xx=True)

    def reap(self, **over: Any) -> Reaped:
        given = {"limit": 100, "gap_ms": 3_600_000, "grace_ms": 60_000, "max_crashes": 3}
        return self.executor.run(self.calls.reap(**(given | over)))

    def crash(self, worker: str = "w1", **over: Any) -> Reaped:
        """The worker dies; somebody reaps it; it comes back as a new process of the same name."""
        self.lapse(worker)
        reaped = self.reap(**over)
        self.register(worker)
        return reaped

    def overdue(self, request_id: str = "a") -> None:
        """Let the request's deadline have passed long ago."""
        self.raw.zadd(self.keys.deadlines, {request_id: _LONG_AGO_MS})

    def late(self, request_id: str = "a") -> None:
        """The same, known to its record too, where a worker looks before it computes."""
        self.overdue(request_id)
        self.raw.hset(self.keys.request(request_id), "deadline_ms", _LONG_AGO_MS)

    def expire(self) -> int:
        return self.executor.run(self.calls.expire(limit=100))

    def pack(self, *, min_age_ms: int = 0, max_requests: int = 1000, max_entries: int = 10**6) -> Packed:
        call = self.keeping.pack(min_age_ms=min_age_ms, max_requests=max_requests, max_entries=max_entries)
        return self.executor.run(call)

    def evict(self, *, max_bytes: int = 10**9, limit: int = 1000) -> Evicted:
        return self.executor.run(self.keeping.evict(max_bytes=max_bytes, limit=limit))

    def migrate(self, source: str = "0", target: str = "1", limit: int = 100) -> int:
        """All that is looked at belongs to the target stage."""
        highs = (0,) * int(target)
        return self.executor.run(self.calls.migrate(source=source, highs=highs, limit=limit)).num_moved

    def repair(self, request_id: str = "a", forgotten_ms: int = 0) -> str:
        return self.executor.run(self.calls.repair(request_id, forgotten_ms=forgotten_ms))

    def publish(self, expected: int, version: int, body: str = "{}") -> Verdict:
        return self.executor.run(self.calls.publish(expected_version=expected, version=version, body=body))

    # looking ------------------------------------------------------------------------------------
    def story(self, request_id: str = "a") -> tuple[str | None, list[str]]:
        """Why it was routed as it was, and its ledger."""
        reads = (self.reads.routed_because(request_id), self.reads.ledger(request_id))
        because, ledger = self.executor.run_many(reads)
        return because, ledger

    def output(self, request_id: str = "a", *, after: int = 0) -> list[OutputEntry]:
        """What is written of its output."""
        return self.executor.run(self.reads.output(request_id, after=after))

    def record(self, request_id: str = "a") -> RequestRecord:
        record = self.executor.run(self.reads.record(request_id))
        assert record is not None, f"no record of {request_id}"
        return record

    def state(self, request_id: str = "a") -> RequestState:
        return self.record(request_id).state

    def counts(self) -> dict[str, int]:
        return {k: int(float(v)) for k, v in self.executor.run(self.reads.counts()).items()}

    def backlog(self) -> dict[str, int]:
        return {k: int(v) for k, v in self.executor.run(self.reads.backlog()).items()}

    def waiting(self, stage: str = "0") -> list[str]:
        return self.executor.run(self.reads.queue_ids(stage, limit=1000))

    def shown(self, request_id: str = "a") -> list[tuple[int, ...]]:
        """What a client reads: token ids of each output entry."""
        return [entry.token_ids for entry in self.executor.run(self.reads.output(request_id))]

    @staticmethod
    def tokens(epoch: int, offset: int, num: int) -> list[int]:
        """Token ids that differ by epoch and position."""
        return [epoch * 1000 + offset + i for i in range(num)]

    # going somewhere ----------------------------------------------------------------------------
    def queue_up(self, *ids: str, stage: str = "0") -> None:
        """Submit these and route them to a stage, in this order."""
        for index, request_id in enumerate(ids):
            self.submit(request_id)
            self.route(request_id, stage=stage, score=float(index))

    def suspect(self, *ids: str) -> None:
        """Let two workers die with these requests: they wait to be run alone."""
        self.queue_up(*ids)
        self.register()
        for _ in range(2):
            self.take()
            self.crash()
        assert self.waiting(SOLO_STAGE) == list(ids)

    def bring(self, state: RequestState | None, request_id: str = "a") -> None:
        """Bring a new request into this state by the shortest legal way; None leaves it absent."""
        if state is None:
            return
        self.submit(request_id)
        if state is RequestState.SUBMITTED:
            return
        if state is RequestState.EXPIRED:
            self.overdue(request_id)
            self.expire()
            return
        if state is RequestState.CANCELLED:
            self.cancel(request_id)
            return
        if state is RequestState.FAILED:
            self.refuse(request_id)
            return
        self.route(request_id)
        if state is RequestState.QUEUED:
            return
        self.register()
        self.grant()
        if state is RequestState.DONE:
            self.settle(request_id, num=1)
        elif state is RequestState.DEAD:
            self.raw.hset(self.keys.request(request_id), mapping={"stage": "solo", "solo_crashes": 2})
            self.crash()

    # comparing ----------------------------------------------------------------------------------
    def dump(self) -> dict[str, Any]:
        """Everything under the namespace, without what changes with the clock alone."""
        found: dict[str, Any] = {}
        for key in sorted(self.raw.scan_iter(match=self.keys.prefix + "*", count=1000)):
            name = key.decode().removeprefix(self.keys.prefix)
            if name == "tick":
                continue
            found[name] = self._value(name, key)
        return found

    def _value(self, name: str, key: bytes) -> Any:
        kind = self.raw.type(key)
        if kind == b"hash":
            return {k: v for k, v in sorted(self.raw.hgetall(key).items()) if k not in _VOLATILE}
        if kind == b"zset":
            members = self.raw.zrange(key, 0, -1, withscores=True)
            return [m for m, _ in members] if name == "workers" else members
        if kind == b"set":
            return sorted(self.raw.smembers(key))
        if kind == b"stream":
            return self.raw.xrange(key)
        return self.raw.get(key)

    def close(self) -> None:
        """Give the raw connection back."""
        self.raw.close()
