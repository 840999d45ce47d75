"""The dispatcher: inbox → count → route by the current plan. Any number of replicas may run."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from dispatcher.metrics import RouterFigures
from dispatcher.router import Router
from dispatcher.tokenizer import Counted, PromptTokenizer, Refusal
from l4queue.config import Settings
from l4queue.errors import L4QueueError
from l4queue.models import Plan, RequestBody, RequestState, SamplingParams
from l4queue.policy.histogram import Buckets
from l4queue.protocol.calls import Call, Calls, Verdict
from l4queue.protocol.door import AsyncDoor
from l4queue.protocol.inbox import Inbox
from l4queue.protocol.keys import Keys
from l4queue.protocol.overview import read_overview_async
from l4queue.protocol.plans import read_plan
from l4queue.protocol.reads import InboxBody, Reads, StreamEntry

__all__ = ("Dispatcher",)

log = logging.getLogger("l4queue.dispatcher")
_LOOK_S = 0.25
_NAME = re.compile(r"[!-+\--~]{1,200}")  # what an id may look like: the same as the scripts have it, and short
_MAX_DELIVERIES = 3  # so many dispatchers may end while they work on an entry: the next one refuses it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrival:
    """One readable inbox entry with the body it refers to."""

    entry_id: str
    request_id: str
    body: InboxBody


class Dispatcher:
    """Routes what arrives. `run_once` does one round and returns how many entries it cleared."""

    def __init__(self, *, settings: Settings, door: AsyncDoor, tokenizer: PromptTokenizer, name: str) -> None:
        self.settings = settings
        self.name = name
        self.keys = Keys(settings.namespace)
        self._door = door
        self._calls = Calls(self.keys)
        self._reads = Reads(self.keys)
        self._inbox = Inbox(door, self.keys, consumer=name)
        self._tokenizer = tokenizer
        self._buckets = Buckets.log_spaced(settings.max_model_len)
        self._stopping = asyncio.Event()
        self._rounded_s = time.monotonic()
        self._router = Router(settings)
        self._looked_s = 0.0
        self.figures = RouterFigures()

    @property
    def plan(self) -> Plan:
        """The plan that this dispatcher routes by."""
        return self._router.plan

    @property
    def idle_s(self) -> float:
        """Since when no round of `run` ended, in s."""
        return time.monotonic() - self._rounded_s

    def request_stop(self) -> None:
        """End `run` after the round in progress."""
        self._stopping.set()

    async def run(self) -> None:
        """Route until stopped. Redis may come and go meanwhile."""
        while not self._stopping.is_set():
            await self.run_once(block_s=1.0)
            self._rounded_s = time.monotonic()
        await self._inbox.leave()

    async def run_once(self, *, block_s: float) -> int:
        """One round: read, count, route."""
        entries = await self._inbox.read(count=self.settings.dispatcher_batch, block_s=block_s)
        return await self._handle_all(entries) if entries else 0

    async def adopt_once(self) -> int:
        """Clear what dispatchers left behind that died or hang.

        An entry that was tried before is tried alone, so that only a culprit can end this dispatcher too; one
        that ended too many of them is refused.
        """
        entry_ids = await self._inbox.adopt(
            min_idle_s=self.settings.dispatcher_claim_idle_s, count=self.settings.dispatcher_batch
        )
        for entry_id in entry_ids:
            claimed = await self._inbox.claim(entry_id)
            if claimed is None:
                continue
            entry, num_deliveries = claimed
            if num_deliveries > _MAX_DELIVERIES:
                await self._refuse_poison(entry)
            else:
                await self._handle_all([entry])
        return len(entry_ids)

    async def _handle_all(self, entries: Sequence[StreamEntry]) -> int:
        """Handle them together; where one of them cannot be handled, one by one, and that one is refused."""
        try:
            return await self.handle(entries)
        except L4QueueError:
            raise
        except Exception as error:  # the edge of the service: no entry may end it
            if len(entries) > 1:
                return sum([await self._handle_all([entry]) for entry in entries])
            log.exception("an entry of the inbox cannot be handled")
            await self._door.run(self._refuse_unreadable(entries[0], f"it cannot be handled: {error!r:.200}"))
            return 1

    def _refuse_unreadable(self, entry: StreamEntry, error: str) -> Call[Verdict]:
        self.figures.refused["unreadable"] += 1
        request_id = entry[1].get(b"i", b"?").decode(errors="replace") or "?"
        raw = repr(entry[1]).encode()
        return self._calls.refuse(request_id, entry_id=entry[0].decode(), error=error, raw=raw)

    async def _refuse_poison(self, entry: StreamEntry) -> None:
        request_id = entry[1].get(b"i", b"?").decode(errors="replace")
        error = f"{_MAX_DELIVERIES} dispatchers ended while counting it"
        call = self._calls.refuse(request_id, entry_id=entry[0].decode(), error=error, field="prompt")
        await self._door.run(call)
        self.figures.refused["poison"] += 1

    async def handle(self, entries: Sequence[StreamEntry]) -> int:
        """Count and route these entries; refusals end in `failed` with the field at fault."""
        begun_s = time.monotonic()
        readable = [(e.decode(), v[b"i"].decode()) for e, v in entries if _is_readable(v)]
        calls: list[Call[Verdict]] = [
            self._refuse_unreadable((e, v), "unreadable inbox entry") for e, v in entries if not _is_readable(v)
        ]
        replies = await self._door.run_many([self._reads.plan(), *(self._reads.body(i) for _, i in readable)])
        await self._follow(*replies[0])
        arrivals = []
        for (entry_id, request_id), body in zip(readable, replies[1:], strict=True):
            if body is None or body.state != RequestState.SUBMITTED:  # gone, cancelled, or routed by another
                calls.append(self._calls.refuse(request_id, entry_id=entry_id, error="no longer waiting"))
            elif body.fault:
                self.figures.refused["unreadable"] += 1
                calls.append(
                    self._calls.refuse(request_id, entry_id=entry_id, error=body.fault, field="body", raw=body.raw)
                )
            else:
                arrivals.append(_Arrival(entry_id=entry_id, request_id=request_id, body=body))
        prompts = [(arrival.body.kind, arrival.body.prompt) for arrival in arrivals]
        counted_s = time.monotonic()
        counted = await asyncio.to_thread(self._tokenizer.count, prompts) if prompts else []
        self.figures.counting.add(time.monotonic() - counted_s)
        calls.extend(self._decide(arrival, answer) for arrival, answer in zip(arrivals, counted, strict=True))
        await self._door.run_many(calls)
        self.figures.rounds.add(time.monotonic() - begun_s)
        return len(calls)

    def _decide(self, arrival: _Arrival, answer: Counted | Refusal) -> Call[Verdict]:
        if isinstance(answer, Counted):
            checked = self._check(arrival.body, len(answer.token_ids))
            if not isinstance(checked, Refusal):
                return self._route(arrival, answer, checked)
            answer = checked
        self.figures.refused[answer.reason] += 1
        log.info("refused", extra={"request_id": arrival.request_id, "field": answer.field})
        return self._calls.refuse(
            arrival.request_id,
            entry_id=arrival.entry_id,
            error=answer.error,
            field=answer.field,
            reason=answer.reason,
        )

    def _check(self, body: InboxBody, prompt_tokens: int) -> tuple[SamplingParams, int] | Refusal:
        """Parameters and priority of a request that can run, or why it cannot."""
        try:
            wire = RequestBody.stored(body.body)
        except ValidationError as invalid:
            first = invalid.errors(include_url=False, include_input=False)[0]
            return Refusal(field=".".join(str(p) for p in first["loc"]) or "body", error=first["msg"])
        limit, wanted = self._tokenizer.max_model_len, wire.params.max_tokens
        if prompt_tokens + wanted > limit:
            field = "prompt" if prompt_tokens >= limit else "max_tokens"
            error = f"{prompt_tokens} prompt tokens and max_tokens {wanted} exceed the model's {limit} tokens"
            return Refusal(field=field, error=error, reason="too_long")
        return wire.params, wire.priority

    def _route(self, arrival: _Arrival, answer: Counted, checked: tuple[SamplingParams, int]) -> Call[Verdict]:
        params, priority = checked
        prompt_tokens = len(answer.token_ids)
        place = self._router.place(prompt_tokens, submitted_ms=arrival.body.submitted_ms, priority=priority)
        self.figures.count_routed(place.stage)
        return self._calls.route(
            arrival.request_id,
            entry_id=arrival.entry_id,
            stage=place.stage,
            score=place.score,
            token_ids=answer.token_ids,
            max_tokens=params.max_tokens,
            plan_version=self.plan.version,
            bucket=self._buckets.index(prompt_tokens),
            why=place.why,
        )

    async def _follow(self, version: int, body: str | None) -> None:
        """Route by the plan in force, and by loads that are not much older than a worker's heartbeat."""
        plan = read_plan(body, key=self.keys.plan) if version != self.plan.version else None
        if plan is not None and plan.version != self.plan.version:
            self._router.follow(plan)
            self._looked_s = 0.0
            log.info("plan", extra={"plan_version": version, "num_stages": len(self.plan.stages)})
        is_old = time.monotonic() - self._looked_s >= _LOOK_S
        if self._router.wants_fresh_loads or (self._router.wants_loads and is_old):
            await self._look()

    async def _look(self) -> None:
        """See queues and loads; for a pushing router also what workers took since they last told their load."""
        overview = await read_overview_async(self._door, self.settings.namespace)
        names = [load.incarnation for load in overview.workers] if self._router.wants_fresh_loads else []
        held = await self._door.run_many([self._reads.num_held(name) for name in names])
        self._router.see(overview, held=dict(zip(names, held, strict=True)))
        self._looked_s = time.monotonic()


def _is_readable(values: dict[bytes, bytes]) -> bool:
    try:
        return bool(_NAME.fullmatch(values[b"i"].decode()))
    except (KeyError, UnicodeDecodeError):
        return False
