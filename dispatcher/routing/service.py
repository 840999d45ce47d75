"""The dispatcher: inbox → count → route by the current plan. Any number of replicas may run."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterator, Sequence

from dispatcher.constraints.checker import ConstraintChecker
from dispatcher.constraints.pending import PendingChecks
from dispatcher.routing.metrics import RouterCounters
from dispatcher.routing.request_fit import Fitted, field_of, fit, read_body
from dispatcher.routing.router import Place, Router
from dispatcher.routing.tokenizer import Counted, PromptTokenizer, Refusal, stored_ids
from l4queue.config import Settings
from l4queue.errors import L4QueueError
from l4queue.model_config import trusts_remote_code
from l4queue.models import Plan, RequestBody, RequestState
from l4queue.observe.overview import cost_in_force, longest_request_tokens, read_overview_async
from l4queue.planning.histogram import Buckets
from l4queue.policy.prefix_blocks import block_keys
from l4queue.protocol.calls import Call, Calls, Verdict
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.inbox import Inbox
from l4queue.protocol.keys import Keys
from l4queue.protocol.parsing import body_told
from l4queue.protocol.plans import read_plan
from l4queue.protocol.reads import InboxBody, Reads, StreamEntry
from l4queue.value_class import value_class

__all__ = ("Dispatcher",)

log = logging.getLogger("l4queue.dispatcher")
placements = logging.getLogger("l4queue.placement")
_LOOK_S = 0.25
"""Age at which the loads of the workers are read again, s. Chosen: half of the interval in which workers
publish."""
_NAME = re.compile(r"[!-+\--~]{1,200}")  # what an id may look like: the same as the scripts have it, and short
_SHORT_BYTES = 1024
"""Prompts of a round that are counted on the event loop, bytes: half a millisecond at 2 MB/s. Longer ones go to a
thread, which takes a tenth of that to begin and to come back."""
_MOST_BYTES = 4 * 2**20
"""Long prompts that are read and counted together, bytes. Chosen: more of them at once save nothing."""
_MOST_DIGITS = 12  # of a number of bytes; an entry with more was written by nobody of us
_MAX_DELIVERIES = 3  # dispatchers that may end while they work on an entry; the next one refuses it


@value_class(kw_only=True)
class _Arrival:
    """One readable inbox entry with the body it refers to, and what that says."""

    entry_id: str
    request_id: str
    body: InboxBody
    wire: RequestBody


@value_class(kw_only=True)
class _Countable:
    """One that can be served: with its length and what of it fits. Its place is decided by the plan in force."""

    arrival: _Arrival
    counted: Counted
    fitted: Fitted


class Dispatcher:
    """Routes what arrives. `run_once` does one round and returns how many entries it cleared."""

    def __init__(
        self,
        *,
        settings: Settings,
        executor: AsyncExecutor,
        tokenizer: PromptTokenizer,
        name: str,
        checker: ConstraintChecker | None = None,
    ) -> None:
        self.settings = settings
        self.name = name
        self.keys = Keys(settings.namespace)
        self._executor = executor
        self._calls = Calls(self.keys)
        self._reads = Reads(self.keys)
        self._inbox = Inbox(executor, self.keys, consumer=name)
        self._tokenizer = tokenizer
        self._checker = checker or ConstraintChecker(
            tokenizer=settings.tokenizer or settings.model,
            limit_s=settings.constraint_check_s,
            trust_remote_code=trusts_remote_code(settings),
        )
        self._checks = PendingChecks(
            inbox=self._inbox,
            checker=self._checker,
            resume=self._adopt,
            claim_idle_s=settings.dispatcher_claim_idle_s,
        )
        self._buckets = Buckets.log_spaced(settings.max_model_len)
        self._told_tokens = 0  # what the workers hold; 0: not known
        self._stopping = asyncio.Event()
        self._rounded_s = time.monotonic()
        self._router = Router(settings)
        self._plan_seen = self._router.plan.version
        self._looked_s = 0.0
        self.counters = RouterCounters()

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
        try:
            while not self._stopping.is_set():
                await self.run_once(block_s=1.0)
                self._rounded_s = time.monotonic()
        finally:
            await self._checks.stop()
        await self._inbox.leave()

    async def run_once(self, *, block_s: float) -> int:
        """One round: read, count, route."""
        entries = await self._inbox.read(count=self.settings.dispatcher_batch, block_s=block_s)
        if entries:
            await self._look_if_due()
        return sum([await self._handle_all(part) for part in _parts(entries)])

    async def look_at_engines(self) -> None:
        """Order by their prefill rate from now on, and refuse what their KV caches cannot hold.

        The latter only where L4_MAX_MODEL_LEN does not say it.

        Where there is a vLLM, constraints may come: the process that checks them loads.
        """
        overview = await read_overview_async(self._executor, self.settings.namespace)
        if any(load.engine in ("vllm", "http") for load in overview.workers):
            await self._checker.prepare()
        self._router.measured(cost_in_force(overview, self.settings))
        told_tokens = longest_request_tokens(overview, self.settings)
        if told_tokens != (self._told_tokens or self._tokenizer.max_model_len):
            log.info("limit %d tokens: what the workers hold", told_tokens)
        self._told_tokens = told_tokens

    async def adopt_once(self) -> int:
        """Clear what dispatchers left behind that died or hang.

        An entry that was tried before is tried alone, so that only a culprit can end this dispatcher too; one
        that ended too many of them is refused.
        """
        entry_ids = await self._inbox.adopt(
            min_idle_s=self.settings.dispatcher_claim_idle_s, count=self.settings.dispatcher_batch
        )
        for entry_id in entry_ids:
            if entry_id not in self._checks:
                await self._adopt(entry_id)
        return len(entry_ids)

    async def _adopt(self, entry_id: bytes) -> None:
        claimed = await self._inbox.claim(entry_id)
        if claimed is None:
            return
        entry, num_deliveries = claimed
        await self._look_if_due()
        if num_deliveries > _MAX_DELIVERIES:
            await self._refuse_poison(entry)
        else:
            await self._handle_all([entry])

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
            await self._executor.run(self._refuse_unreadable(entries[0], f"it cannot be handled: {error!r:.200}"))
            return 1

    def _refuse_unreadable(self, entry: StreamEntry, error: str) -> Call[Verdict]:
        self.counters.refused["unreadable"] += 1
        request_id = entry[1].get(b"i", b"?").decode(errors="replace") or "?"
        raw = repr(entry[1]).encode()
        return self._calls.refuse(request_id, entry_id=entry[0].decode(), error=error, raw=raw)

    async def _refuse_poison(self, entry: StreamEntry) -> None:
        request_id = entry[1].get(b"i", b"?").decode(errors="replace")
        error = f"{_MAX_DELIVERIES} dispatchers ended while counting it"
        call = self._calls.refuse(request_id, entry_id=entry[0].decode(), error=error, field="prompt")
        await self._executor.run(call)
        self.counters.refused["poison"] += 1

    async def handle(self, entries: Sequence[StreamEntry]) -> int:
        """Check, count and route these entries; refusals end in `failed` with the field at fault.

        An entry whose constraint is not known yet is set aside; the others do not wait for it.
        """
        begun_s = time.monotonic()
        readable = [(e, v) for e, v in entries if _is_readable(v)]
        calls: list[Call[Verdict]] = [
            self._refuse_unreadable((e, v), "unreadable inbox entry") for e, v in entries if not _is_readable(v)
        ]
        arrivals = []
        for (entry, values), body in zip(readable, await self._bodies(readable), strict=True):
            entry_id, request_id = entry.decode(), values[b"i"].decode()
            if body is None or body.state != RequestState.SUBMITTED:  # gone, cancelled, or routed by another
                calls.append(self._calls.refuse(request_id, entry_id=entry_id, error="no longer waiting"))
            elif body.fault:
                self.counters.refused["unreadable"] += 1
                calls.append(
                    self._calls.refuse(request_id, entry_id=entry_id, error=body.fault, field="body", raw=body.raw)
                )
            else:
                examined = self._examine(entry_id, body)
                if isinstance(examined, Refusal):
                    calls.append(self._refuse(request_id, entry_id, examined))
                elif examined is not None:
                    arrivals.append(_Arrival(entry_id=entry_id, request_id=request_id, body=body, wire=examined))
        counted = await self._count([arrival.body for arrival in arrivals])
        decided = [self._decide(arrival, answer) for arrival, answer in zip(arrivals, counted, strict=True)]
        calls.extend(one for one in decided if isinstance(one, Call))
        countable = [one for one in decided if isinstance(one, _Countable)]
        if stale := await self._send(calls, countable, plan_seen=self._plan_seen):
            await self._follow()
            await self._send((), stale, plan_seen=None)
        self.counters.rounds.add(time.monotonic() - begun_s)
        return len(calls) + len(countable)

    async def _send(
        self, calls: Sequence[Call[Verdict]], countable: Sequence[_Countable], *, plan_seen: int | None
    ) -> list[_Countable]:
        """Send refusals, place and route the others; return those left unrouted, as another plan is in force."""
        places = [
            self._router.place(
                one.counted.num_tokens,
                submitted_ms=one.arrival.body.submitted_ms,
                priority=one.arrival.wire.priority,
            )
            for one in countable
        ]
        routes = [self._route(one, place, plan_seen) for one, place in zip(countable, places, strict=True)]
        verdicts = (await self._executor.run_many([*calls, *routes]))[len(calls) :]
        stale = []
        for one, place, verdict in zip(countable, places, verdicts, strict=True):
            if verdict is Verdict.STALE:
                stale.append(one)
            else:
                self.counters.count_routed(place.stage)
        return stale

    @property
    def _goes_by_prefix(self) -> bool:
        """Whether workers take by what they hold: then the blocks of prompts are told, and who holds them."""
        return self.plan.goes_by_prefix(self.settings.prefix_affinity)

    async def _bodies(self, entries: Sequence[StreamEntry]) -> list[InboxBody | None]:
        """What the entries tell, or else the records say; None where a record has gone."""
        told = [body_told(values) for _, values in entries]
        if self._goes_by_prefix:  # it looks into all prompts
            told = [None if body is None or body.num_ids is not None else body for body in told]
        unknown = [values[b"i"].decode() for (_, values), body in zip(entries, told, strict=True) if body is None]
        found = iter(await self._executor.run_many([self._reads.body(request_id) for request_id in unknown]))
        return [next(found) if body is None else body for body in told]

    async def _count(self, bodies: Sequence[InboxBody]) -> list[Counted | Refusal]:
        """The length of each prompt, or why it has none. Ids have been counted; much text is read off the loop."""
        prompts = [(body.kind, body.prompt) for body in bodies if body.num_ids is None]
        answers: Iterator[Counted | Refusal] = iter(())
        if prompts:
            began_s = time.monotonic()
            is_short = sum(len(prompt) for _, prompt in prompts) <= _SHORT_BYTES
            count = self._tokenizer.count
            answers = iter(count(prompts) if is_short else await asyncio.to_thread(count, prompts))
            self.counters.counting.add(time.monotonic() - began_s)
        return [next(answers) if body.num_ids is None else self._stored(body) for body in bodies]

    def _stored(self, body: InboxBody) -> Counted | Refusal:
        size = self._tokenizer.vocabulary_size
        return stored_ids(body.num_ids or 0, body.greatest_id, vocabulary_size=size)

    def _examine(self, entry_id: str, body: InboxBody) -> RequestBody | Refusal | None:
        """The fields of a body; None when its constraint has to be checked first."""
        wire = read_body(body.body)
        if isinstance(wire, Refusal) or wire.params.structured_outputs is None:
            return wire
        verdict = self._checker.known(wire.params.structured_outputs)
        if verdict is None:
            self._checks.hold(entry_id.encode(), wire.params.structured_outputs)
            return None
        if verdict.error:
            return Refusal(field=field_of(wire.params.structured_outputs), error=verdict.error)
        return wire

    def _decide(self, arrival: _Arrival, answer: Counted | Refusal) -> Call[Verdict] | _Countable:
        if isinstance(answer, Counted):
            fitted = fit(
                arrival.wire,
                arrival.body,
                answer.num_tokens,
                limit_tokens=self._told_tokens or self._tokenizer.max_model_len,
                vocabulary_size=self._tokenizer.vocabulary_size,
            )
            if not isinstance(fitted, Refusal):
                return _Countable(arrival=arrival, counted=answer, fitted=fitted)
            answer = fitted
        return self._refuse(arrival.request_id, arrival.entry_id, answer)

    def _refuse(self, request_id: str, entry_id: str, answer: Refusal) -> Call[Verdict]:
        self.counters.refused[answer.reason] += 1
        log.info("refused", extra={"request_id": request_id, "field": answer.field})
        return self._calls.refuse(
            request_id,
            entry_id=entry_id,
            error=answer.error,
            field=answer.field,
            reason=answer.reason,
        )

    def _route(self, one: _Countable, place: Place, plan_seen: int | None) -> Call[Verdict]:
        arrival, answer, fitted = one.arrival, one.counted, one.fitted
        return self._calls.route(
            arrival.request_id,
            entry_id=arrival.entry_id,
            stage=place.stage,
            score=place.score,
            token_ids=() if answer.num_stored else answer.token_ids,
            num_stored=answer.num_stored,
            max_tokens=fitted.max_tokens,
            plan_version=self.plan.version,
            bucket=self._buckets.index(answer.num_tokens),
            why=place.why,
            charge_tokens=fitted.charge_tokens,
            body=fitted.body,
            blocks=block_keys(answer.token_ids) if self._goes_by_prefix else (),
            plan_seen=plan_seen,
        )

    async def _follow(self) -> None:
        """Route by the plan in force from now on; by the one before where that cannot be read."""
        version, body = await self._executor.run(self._reads.plan())
        self._plan_seen = version
        plan = read_plan(body, key=self.keys.plan) if version != self.plan.version else None
        if plan is not None and plan.version != self.plan.version:
            self._router.follow(plan)
            self._looked_s = 0.0
            placements.info("plan", extra={"plan_version": version, "num_stages": len(self.plan.stages)})
        await self._look_if_due()

    async def _look_if_due(self) -> None:
        """Look at loads, where they count, that are much older than a worker's heartbeat."""
        is_old = time.monotonic() - self._looked_s >= _LOOK_S
        if self._router.wants_fresh_loads or (self._router.wants_loads and is_old):
            await self._look()

    async def _look(self) -> None:
        """See queues and loads; for a pushing router also what workers took since they last told their load."""
        overview = await read_overview_async(self._executor, self.settings.namespace)
        names = [load.incarnation for load in overview.workers] if self._router.wants_fresh_loads else []
        held = await self._executor.run_many([self._reads.num_held(name) for name in names])
        self._router.see(overview, held=dict(zip(names, held, strict=True)))
        self._looked_s = time.monotonic()


def _parts(entries: Sequence[StreamEntry]) -> Iterator[list[StreamEntry]]:
    """The same in order, so that no part has more long prompts than are to be in memory, and in one reply."""
    part: list[StreamEntry] = []
    part_bytes = 0
    for entry in entries:
        told = entry[1].get(b"b", b"")
        num_bytes = int(told) if told.isdigit() and len(told) < _MOST_DIGITS else 0
        if part and part_bytes + num_bytes > _MOST_BYTES:
            yield part
            part, part_bytes = [], 0
        part.append(entry)
        part_bytes += num_bytes
    if part:
        yield part


def _is_readable(values: dict[bytes, bytes]) -> bool:
    try:
        return bool(_NAME.fullmatch(values[b"i"].decode()))
    except (KeyError, UnicodeDecodeError):
        return False
