"""A worker's view of the fleet, refreshed every 0.5 s: worker and stage loads, recent output lengths."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter
from collections.abc import Sequence

from l4queue.config import Settings
from l4queue.cost.step import StepCost
from l4queue.models import Plan, WorkerLoad
from l4queue.observe.overview import Overview, QueueView, read_overview_async, stage_loads
from l4queue.policy.loads import EARLY_NEWS_S, NEWS_INTERVAL_S, StageLoad, backlog_ms, prefill_ahead_ms
from l4queue.policy.newcomer import stage_for_newcomer
from l4queue.policy.output_lengths import OutputLengths
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import SOLO_STAGE, Keys
from l4queue.protocol.parsing import order
from l4queue.protocol.reads import Reads
from l4queue.protocol.survey import KEPT_MS, Survey, SurveyedQueue, kept_survey, survey
from workers.loop.session import Session

__all__ = ("FleetView",)

_SPREAD = (0.8, 1.2)
"""Of the time between two looks. Chosen: workers that began together do not all make the same survey."""


class FleetView:
    """Refreshed by the worker's own loop. Before the first look there are no others."""

    def __init__(self, *, settings: Settings, executor: AsyncExecutor, worker_id: str) -> None:
        self._namespace = settings.namespace
        self._quiet_ms = settings.background_quiet_s * 1000
        self._executor = executor
        self._keys = keys = Keys(settings.namespace)
        self._reads = Reads(keys)
        self._worker_id = worker_id
        self._last_ending: tuple[int, int] | None = None
        self._lightest: tuple[Overview | None, int, float] = (None, -1, math.inf)
        self._newcomer: tuple[int, int] | None = None
        self._looking = asyncio.Lock()  # what finished is counted once
        self._is_due = asyncio.Event()
        self._heads: dict[str, tuple[str, int]] = {}  # the first of each queue, and when it was first seen so, ms
        self._num_able: Counter[int] = Counter()
        self._stages: dict[str, int] = {}  # of workers, by the plan of the last look
        self.num_workers = 1
        self.has_older = False  # workers of a release in which an arrival wakes all: so may its dispatchers be
        self.overview: Overview | None = None
        self.outputs = OutputLengths()

    def look_soon(self) -> None:
        """Look again before its time: something waits in another stage."""
        self._is_due.set()

    async def next_look(self) -> Overview:
        """Look when it is time, or sooner where that is due."""
        self._is_due.clear()
        await asyncio.sleep(EARLY_NEWS_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout((NEWS_INTERVAL_S - EARLY_NEWS_S) * random.uniform(*_SPREAD)):
                await self._is_due.wait()
        is_soon = self._is_due.is_set()
        return await self.refresh(max_age_ms=round(EARLY_NEWS_S * 1000) if is_soon else KEPT_MS)

    async def refresh(self, *, max_age_ms: int = 0) -> Overview:
        """Look at plan, workers and queues, and at what has finished since the last look.

        What another worker saw within `max_age_ms` will do.
        """
        async with self._looking:
            seen = await self._survey(max_age_ms)
            self.num_workers, self.has_older = seen.num_workers, seen.has_older
            self.overview = overview = Overview(
                now_ms=seen.at_ms,
                plan=await self._plan(seen.plan_version),
                plan_version=seen.plan_version,
                workers=seen.workers,
                share=seen.share,
                costs=(),
                prices=(),
                queues={queue.stage: _view_of(queue) for queue in seen.queues if _is_shown(queue)},
                inbox=seen.inbox,
                counts={},
            )
            self._heads = {
                queue.stage: self._heads[queue.stage]
                if self._heads.get(queue.stage, ("", 0))[0] == queue.head_id
                else (queue.head_id, seen.at_ms)
                for queue in seen.queues
                if queue.num_requests
            }
            self._num_able = Counter(self.stage_of(w) for w in overview.workers if w.is_open)
            await self._learn(seen)
        return overview

    async def _survey(self, max_age_ms: int) -> Survey:
        """Another worker's survey if it is young enough, else an own one."""
        seen = await self._executor.run(kept_survey(self._keys)) if max_age_ms >= KEPT_MS else None
        if seen is None and max_age_ms:
            seen = await self._executor.run(survey(self._keys, max_age_ms=max_age_ms))
        seen = seen or await self._executor.run(survey(self._keys))
        assert seen is not None, "what no other worker wrote can be read"
        return seen

    async def _plan(self, version: int) -> Plan:
        """The plan in force, read where it is not the one of the last look."""
        if self.overview is not None and self.overview.plan_version == version:
            return self.overview.plan
        plan = (await read_overview_async(self._executor, self._namespace)).plan
        self._stages = {name: index for index, stage in enumerate(plan.stages) for name in stage.worker_ids}
        return plan

    async def _learn(self, seen: Survey) -> None:
        """Add the output lengths that are new; first those of the latest requests, more than a survey has."""
        if self._last_ending is None:
            ending, lengths = await self._executor.run(self._reads.output_lengths(after=None))
            self._last_ending = order((ending or "0-0").encode())
        else:
            last = self._last_ending
            new = [(at, tokens) for ending, tokens in seen.outputs if (at := order(ending.encode())) > last]
            self._last_ending = max((at for at, _ in new), default=last)
            lengths = [tokens for _, tokens in new]
        self.outputs.add(lengths)

    def others(self, *, stage: int | None = None) -> list[WorkerLoad]:
        """The other workers, of one stage or of all."""
        found = self.overview.workers if self.overview else ()
        return [w for w in found if w.worker_id != self._worker_id and stage in (None, self.stage_of(w))]

    async def asked_again(self, workers: Sequence[WorkerLoad]) -> list[WorkerLoad]:
        """Loads that these workers publish now, without workers that are gone."""
        views = await self._executor.run_many([self._reads.worker(w.incarnation, 0) for w in workers])
        return [view.load for view in views if view is not None]

    def lightest_ms(self, stage: int, *, cost: StepCost) -> float:
        """The least that another worker of this stage had before it; infinite where there is none."""
        known, of_stage, found_ms = self._lightest
        if known is not self.overview or of_stage != stage:
            backlogs_ms = (
                backlog_ms(
                    load.num_running,
                    load.context_tokens,
                    pending_prefill_tokens=load.pending_prefill_tokens,
                    cost=cost,
                )
                for load in self.others(stage=stage)
                if load.is_open
            )
            found_ms = min(backlogs_ms, default=math.inf)
            self._lightest = (self.overview, stage, found_ms)
        return found_ms

    def ahead_ms(self, pending_tokens: int, stage: int, *, cost: StepCost) -> float:
        """Prefill before the running requests of a worker of this stage with these tokens pending, ms."""
        if self.overview is None:
            return cost.prefill_ms(pending_tokens)
        queue = self.overview.in_play(str(stage), quiet_ms=self._quiet_ms)
        return prefill_ahead_ms(
            pending_tokens,
            queued_requests=queue.num_requests if queue else 0,
            queued_tokens=queue.tokens if queue else 0,
            num_workers=round(self._num_able[stage] / self.overview.share),
            cost=cost,
        )

    def expected_remaining(self, session: Session) -> float:
        """Tokens it still generates: all where nothing else ends the output, else by what others went on to."""
        params, left = session.params, session.remaining_tokens
        if params.ignore_eos and not params.stop and not params.stop_token_ids:
            return float(left)
        return self.outputs.expected_remaining(len(session.output_ids), limit=left)

    @property
    def num_waiting(self) -> int:
        """Requests that wait anywhere."""
        if self.overview is None:
            return 0
        return self.overview.inbox + sum(queue.num_requests for queue in self.overview.queues.values())

    @property
    def num_in_play(self) -> int:
        """Requests that wait anywhere, without those of the background that are held back."""
        if self.overview is None:
            return 0
        queues = [self.overview.in_play(stage, quiet_ms=self._quiet_ms) for stage in self.overview.queues]
        return self.overview.inbox + sum(queue.num_requests for queue in queues if queue is not None)

    @property
    def num_solo(self) -> int:
        """Requests that wait to be run alone."""
        queue = self.overview.queues.get(SOLO_STAGE) if self.overview else None
        return queue.num_requests if queue else 0

    def num_queued(self, stage: int) -> int:
        """Requests in play that wait in the queue of a stage."""
        queue = self.overview.in_play(str(stage), quiet_ms=self._quiet_ms) if self.overview else None
        return queue.num_requests if queue else 0

    def has_waiting(self, stage: str) -> bool:
        """Whether anything waits in a queue, the background included."""
        return stage in self._heads

    def is_stuck(self, stage: str) -> bool:
        """Whether a queue had the same request at its head for a while: the worker woken for it may have died."""
        _, since_ms = self._heads.get(stage, ("", math.inf))
        return self.overview is not None and self.overview.now_ms - since_ms >= KEPT_MS

    def has_background(self, stage: int) -> bool:
        """Whether background requests wait in the queue of a stage."""
        queue = self.overview.queues.get(str(stage)) if self.overview else None
        return queue is not None and queue.num_requests > queue.num_foreground

    def stage_loads(self, *, cost: StepCost) -> list[StageLoad]:
        """The load of every stage of the plan, by what its workers published and what waits for it."""
        if self.overview is None:
            return []
        expected = self.outputs.mean_tokens
        return stage_loads(self.overview, expected_output_tokens=expected, cost=cost, quiet_ms=self._quiet_ms)

    def newcomer_stage(self, plan: Plan, *, cost: StepCost) -> int:
        """Where a worker that the plan does not know is needed most; it stays there until the next plan."""
        if self._newcomer is None or self._newcomer[0] != plan.version:
            chosen = stage_for_newcomer(plan, self.others(), queues=self.stage_loads(cost=cost))
            self._newcomer = (plan.version, chosen.stage)
        return self._newcomer[1]

    def stage_of(self, worker: WorkerLoad) -> int:
        """By the plan, even if the worker's latest news is older than that."""
        return self._stages.get(worker.worker_id, worker.stage)


def _is_shown(queue: SurveyedQueue) -> bool:
    return queue.num_requests > 0 or queue.stage != SOLO_STAGE


def _view_of(queue: SurveyedQueue) -> QueueView:
    return QueueView(
        num_requests=queue.num_requests,
        tokens=queue.tokens,
        num_foreground=queue.num_foreground,
        foreground_ms=queue.foreground_ms,
    )
