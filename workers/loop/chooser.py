"""Choice by prefix affinity: which waiting requests this worker takes, and what it tells of its prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from l4queue.models import WorkerLoad
from l4queue.policy.admission import AdmissionBudget, AdmissionState, admission_budget
from l4queue.policy.prefix_affinity import (
    MAX_LOOKED_AT,
    CandidateWorker,
    Choice,
    OwnChoice,
    own_choices,
    place,
)
from l4queue.policy.prefix_blocks import BLOCK_TOKENS
from l4queue.policy.queue_order import background_overdue_ms
from l4queue.protocol.calls import Verdict
from l4queue.protocol.holders import hold, look
from workers.loop.context import WorkerContext
from workers.loop.engine_profile import EngineProfile
from workers.loop.fleet_view import FleetView
from workers.loop.held_blocks import BlockNews
from workers.loop.lease import Lease
from workers.loop.placement import Placement
from workers.loop.report import WorkerReport
from workers.loop.sessions import Sessions

__all__ = ("Chooser",)

_LONGEST_PAUSE_S = 60.0  # between two news of blocks, so that the others do not forget them


class Chooser:
    """Looks at the head of the stage's queue with the loads of all its workers, this one's exact.

    Off where the engine has no prefix cache, and unless L4_PREFIX_AFFINITY is true, or auto and the plan says so.
    """

    def __init__(
        self,
        context: WorkerContext,
        *,
        sessions: Sessions,
        placement: Placement,
        profile: EngineProfile,
        fleet_view: FleetView,
        lease: Lease,
        report: WorkerReport,
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._placement = placement
        self._profile = profile
        self._fleet_view = fleet_view
        self._lease = lease
        self._report = report
        self._left_s: dict[str, float] = {}  # since when a request is seen that others should have taken
        self._told_s = 0.0
        self.has_waiting = False

    @property
    def is_on(self) -> bool:
        """Whether this worker takes by choice. From the first time on it keeps account of what it holds."""
        profile, placement = self._profile, self._placement
        goes_by_prefix = placement.plan.goes_by_prefix(self._context.settings.prefix_affinity)
        if not (goes_by_prefix and placement.is_l4 and profile.is_started and profile.info.has_prefix_cache):
            return False
        if self._sessions.blocks is None:
            self._sessions.keep_blocks(profile.info.kv_capacity_tokens // BLOCK_TOKENS)
        return True

    async def choose(self, room: AdmissionBudget) -> tuple[OwnChoice, ...]:
        """Requests of the stage's queue for this worker, in serving order."""
        context, stage = self._context, self._placement.stage
        overdue_ms = background_overdue_ms(context.settings.starvation_bound_s)
        call = look(context.keys, str(stage), limit=MAX_LOOKED_AT, overdue_ms=overdue_ms)
        queue = await context.executor.run(call)
        self.has_waiting = bool(queue)
        if not queue:
            self._left_s = {}
            return ()
        candidates = [self._own(room), *self._others(stage, num_waiting=len(queue))]
        choices = place(
            queue,
            candidates,
            expected_output_tokens=self._fleet_view.outputs.mean_tokens,
            cost=self._profile.cost,
        )
        await self._ring(choices)
        left_ms = self._note_left(choices)
        return own_choices(choices, queue, worker_id=context.worker_id, budget=room, left_ms=left_ms)

    async def tell(self) -> None:
        """Tell the dispatchers what has changed of the blocks here."""
        is_on, blocks, context = self.is_on, self._sessions.blocks, self._context
        if not is_on:
            self._rest()
        if not is_on or blocks is None:
            return
        now_s, news = asyncio.get_running_loop().time(), blocks.news()
        if news is None:
            if now_s - self._told_s < _LONGEST_PAUSE_S:
                return
            news = BlockNews(added=(), removed=(), is_all=False)
        call = hold(
            context.keys,
            self._lease.incarnation,
            added=news.added,
            removed=news.removed,
            is_all=news.is_all,
        )
        if await context.executor.run(call) is Verdict.OK:
            blocks.told(news)
            self._told_s = now_s
        else:  # a new lease, or nobody knows anything any more
            blocks.forgotten()

    def _rest(self) -> None:
        """Forget all that only a choice needs: a plan of stages may have come."""
        self.has_waiting, self._left_s = False, {}
        self._sessions.forget_blocks()

    async def _ring(self, choices: Sequence[Choice]) -> None:
        """Wake the workers for which requests seen for the first time are left."""
        context, stage = self._context, self._placement.stage
        chosen = {one.worker_id for one in choices if one.request_id not in self._left_s} - {context.worker_id}
        found = [load.incarnation for load in self._fleet_view.others(stage=stage) if load.worker_id in chosen]
        if found:
            await context.executor.run(context.calls.ring(str(stage), incarnations=found))

    def _note_left(self, choices: Sequence[Choice]) -> dict[str, float]:
        """For how long each request was seen here that others have room for, ms."""
        now_s, own_id = asyncio.get_running_loop().time(), self._context.worker_id
        left = [one.request_id for one in choices if one.worker_id not in (None, own_id)]
        self._left_s = {request_id: self._left_s.get(request_id, now_s) for request_id in left}
        return {request_id: (now_s - since_s) * 1000 for request_id, since_s in self._left_s.items()}

    def _own(self, room: AdmissionBudget) -> CandidateWorker:
        return _candidate(self._report.load(), room)

    def _others(self, stage: int, *, num_waiting: int) -> Iterator[CandidateWorker]:
        fleet_view, cost = self._fleet_view, self._profile.cost
        others = [load for load in fleet_view.others(stage=stage) if load.is_open]
        for load in others:
            state = AdmissionState.of(
                load,
                longest_prefill_tokens=load.longest_prefill_tokens,
                num_waiting=num_waiting / (len(others) + 1),
                remaining_tokens=fleet_view.outputs.mean_tokens,
            )
            yield _candidate(load, admission_budget(state, cost=cost))


def _candidate(load: WorkerLoad, budget: AdmissionBudget) -> CandidateWorker:
    return CandidateWorker(
        worker_id=load.worker_id,
        num_running=load.num_running,
        context_tokens=load.context_tokens,
        due_ms=load.prefill_due_ms,
        budget=budget,
    )
