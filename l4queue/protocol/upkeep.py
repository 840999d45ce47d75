"""Upkeep for any dispatcher or worker, at any rate: reap, expire, migrate, repair, measure."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from l4queue.config import Settings
from l4queue.models import Plan
from l4queue.protocol.calls import Call, Calls, Reaped
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.foreign import text
from l4queue.protocol.keys import Keys, is_private_queue, private_queue
from l4queue.protocol.plans import read_plan
from l4queue.protocol.reads import Reads
from l4queue.protocol.retention import PACK_AGE_MS, Retention

__all__ = ("Upkeep", "UpkeepReport")

log = logging.getLogger("l4queue.upkeep")
_LIMIT = 200  # requests of one call: some milliseconds of the server
_FORGOTTEN_MS = 60_000  # a submitted request without an inbox entry for a minute is entered again
_UNSEEN_MS = 3_600_000  # dispatchers that were idle for an hour leave the inbox's group
_PACK_REQUESTS, _PACK_ENTRIES, _TURNS = 100, 1000, 50  # a turn takes the server some milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class UpkeepReport:
    """Result of one round of upkeep."""

    num_requeued: int = 0
    num_dead: int = 0
    num_expired: int = 0
    num_migrated: int = 0
    num_packed: int = 0
    num_dropped: int = 0
    was_graced: bool = False


class Upkeep:
    """The rounds of upkeep. Idempotent: any number of processes may run them at once."""

    def __init__(self, *, settings: Settings, executor: AsyncExecutor) -> None:
        self._settings = settings
        self._executor = executor
        self._keys = Keys(settings.namespace)
        self._calls = Calls(self._keys)
        self._retention = Retention(self._keys)
        self._reads = Reads(self._keys)
        self._scan_cursor = 0

    @property
    def interval_s(self) -> float:
        """Pause between rounds, s: five times a lease, so that a dead worker is noticed within 1.2 leases."""
        return min(1.0, self._settings.lease_s / 5)

    async def run_once(self, plan: Plan) -> UpkeepReport:
        """Return the work of dead workers, end what is too late, move what waits where nobody takes it.

        That is in stages that the plan no longer has, and in the own queues of workers that are gone. What has
        ended is packed, and kept within its bound.
        """
        lease_ms = int(self._settings.lease_s * 1000)
        reap: Call[Reaped] = self._calls.reap(
            limit=_LIMIT,
            gap_ms=max(lease_ms // 2, 1000),
            grace_ms=lease_ms,
            max_crashes=self._settings.max_crashes,
        )
        looks = (self._reads.plan(), self._reads.backlog(), self._reads.incarnations())
        reaped, expired, (version, body), backlog, incarnations = await self._executor.run_many(
            [reap, self._calls.expire(limit=_LIMIT), *looks]
        )
        known: Plan | None = plan
        if body is not None and version != plan.version:  # who routes nothing for a while has an old one
            newer = read_plan(body, key=self._keys.plan)
            known = newer if newer is None or newer.version > plan.version else plan
        alive = {private_queue(name.rpartition(":")[0]) for name, _ in incarnations}
        gone = [s for s, tokens in backlog.items() if float(tokens) > 0 and _is_gone(s, known, alive)]
        highs = (known or plan).highs
        moves = [self._calls.migrate(source=s, highs=highs, limit=_LIMIT) for s in gone]
        num_migrated = sum(answer.num_moved for answer in await self._executor.run_many(moves))
        num_packed = await self._pack()
        num_dropped = await self._evict()
        report = UpkeepReport(
            num_requeued=reaped.num_requeued,
            num_dead=reaped.num_dead,
            num_expired=expired,
            num_migrated=num_migrated,
            num_packed=num_packed,
            num_dropped=num_dropped,
            was_graced=reaped.was_graced,
        )
        if replace(report, num_packed=0) != UpkeepReport():  # packing goes on always: not worth a line
            log.info("upkeep", extra=asdict(report))
        return report

    async def _pack(self) -> int:
        """Pack what ended a while ago; how many requests."""
        call = self._retention.pack(min_age_ms=PACK_AGE_MS, max_requests=_PACK_REQUESTS, max_entries=_PACK_ENTRIES)
        total = 0
        for _ in range(_TURNS):
            answer = await self._executor.run(call)
            total += answer.num_packed
            if not answer.has_more:
                break
        return total

    async def _evict(self) -> int:
        """Keep what has ended within its bound; how many results went early."""
        call = self._retention.evict(max_bytes=self._settings.max_result_bytes, limit=_LIMIT)
        dropped = forgotten = 0
        for _ in range(_TURNS):
            answer = await self._executor.run(call)
            dropped, forgotten = dropped + answer.num_dropped, forgotten + answer.num_forgotten
            if not answer.has_more:
                break
        if dropped or forgotten:
            log.warning(
                "results beyond L4_MAX_RESULT_BYTES went early",
                extra={"num_dropped": dropped, "num_keys_forgotten": forgotten},
            )
        return dropped

    async def reroute(self, plan: Plan) -> int:
        """Move what waits to the stages where it belongs by a new plan; how many moved."""
        backlog = await self._executor.run(self._reads.backlog())
        total = 0
        for source in sorted(s for s, tokens in backlog.items() if s.isdigit() and float(tokens) > 0):
            skip, num_seen = 0, _LIMIT
            while num_seen == _LIMIT:
                answer = await self._executor.run(
                    self._calls.migrate(source=source, highs=plan.highs, limit=_LIMIT, skip=skip)
                )
                total, num_seen = total + answer.num_moved, answer.num_seen
                skip += answer.num_seen - answer.num_moved
        return total

    async def measure_drain(self) -> float:
        """Tokens finished per second over the latest requests; stored for the retry hint of QueueFull."""
        finished = await self._executor.run(self._reads.finished(count=500))
        rate = 0.0
        if len(finished) >= 2:
            times_ms = [f.finished_ms for f in finished]  # newest first; steps back of the clock are left out
            span_ms = sum(max(0, later - earlier) for later, earlier in pairwise(times_ms))
            tokens = sum(f.prompt_tokens + f.output_tokens for f in finished)
            rate = tokens * 1000.0 / max(1, span_ms)
        command = ("HSET", self._keys.counts, "drain_tokens_per_s", f"{rate:.1f}")
        await self._executor.offer(
            Call(None, (), command, int)
        )  # a hint: the old one stands while memory is short
        return rate

    async def repair_once(self) -> int:
        """Check one page of records against queues and leases; log an alarm for each one mended.

        Dispatchers that died long ago leave the inbox group.
        """
        await self._executor.run(self._calls.forget(idle_ms=_UNSEEN_MS))
        pattern = self._keys.request("*")
        command = ("SCAN", self._scan_cursor, "MATCH", pattern, "COUNT", 500)
        cursor, found = await self._executor.run(Call(None, (), command, _page))
        self._scan_cursor = cursor
        ids = [key.removeprefix(self._keys.request("")) for key in found]
        answers = await self._executor.run_many([self._calls.repair(i, forgotten_ms=_FORGOTTEN_MS) for i in ids])
        mended = [(i, what) for i, what in zip(ids, answers, strict=True) if what != "FINE"]
        for request_id, what in mended:
            log.error("repaired", extra={"request_id": request_id, "missing": what})
        return len(mended)


def _is_gone(stage: str, plan: Plan | None, alive: set[str]) -> bool:
    """Which stages there are nobody knows who cannot read the plan in force."""
    if is_private_queue(stage):
        return stage not in alive
    return plan is not None and stage.isdecimal() and int(stage[:9]) >= len(plan.stages)


def _page(reply: tuple[int | bytes, list[bytes]]) -> tuple[int, list[str]]:
    return int(reply[0]), [text(key) for key in reply[1]]
