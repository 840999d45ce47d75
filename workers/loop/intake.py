"""Intake: which requests a worker takes, from which queue, and how each starts or resumes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from l4queue.models import RequestState
from l4queue.policy.admission import (
    AdmissionBudget,
    AdmissionState,
    admission_budget,
    pull_delay_ms,
    still_awaited,
    unbounded_budget,
)
from l4queue.policy.escape import has_prefill
from l4queue.policy.handover import first_watch
from l4queue.policy.prefix_affinity import OwnChoice
from l4queue.policy.steal import Steal, steal_waiting
from l4queue.protocol.calls import Taker, Verdict
from l4queue.protocol.foreign import finding
from l4queue.protocol.keys import SOLO_STAGE, private_queue
from l4queue.protocol.readiness import LeasedArrival, Readiness
from l4queue.protocol.records import BackgroundQuota, Grant, Outcome, OutputEntry
from workers.loop.background import BackgroundWork
from workers.loop.chooser import Chooser
from workers.loop.context import WorkerContext
from workers.loop.engine_profile import EngineProfile
from workers.loop.fleet_view import FleetView
from workers.loop.lease import Lease
from workers.loop.placement import Placement
from workers.loop.report import WorkerReport
from workers.loop.rollback import Rollback
from workers.loop.session import Session, engine_id
from workers.loop.sessions import Sessions
from workers.loop.solo import SoloTurn
from workers.loop.wakeups import Wakeup
from workers.loop.writer import Writer

__all__ = ("Intake",)

log = logging.getLogger("l4queue.worker")
_IDLE_S = 1.0  # between two looks of a worker that nothing wakes
_READY_S = 5.0
"""The same of one that an arrival wakes. Chosen: only a Redis that lost data forgets it. What waits then is seen
with the next look at the fleet."""
_WAITING_S = 0.1
"""The same while requests wait that this worker may come to take. Chosen: such waits last for seconds."""
_SOLO_ROOM = unbounded_budget(1, reason="runs alone")


class Intake:
    """Takes from the own queue, then from siblings. `pull_once` returns how many requests it took."""

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
        writer: Writer,
        background: BackgroundWork,
        solo: SoloTurn,
        rollback: Rollback,
        escape_before_prefill: Callable[[], Awaitable[None]],
    ) -> None:
        """`escape_before_prefill` is awaited before a prompt begins whose prefill holds up running requests."""
        self._context = context
        self._sessions = sessions
        self._placement = placement
        self._profile = profile
        self._fleet_view = fleet_view
        self._lease = lease
        self._report = report
        self._writer = writer
        self._background = background
        self._solo = solo
        self._rollback = rollback
        self._escape_before_prefill = escape_before_prefill
        self._awaited: frozenset[str] | None = None  # what ran when the queue began to wait, and still runs
        self._private_due = True  # something may wait for this worker alone
        self._solo_due = True  # the same of the solo queue
        self._is_rung = False  # woken for an arrival that nobody else was woken for
        self._is_ready = False  # the next arrival may wake this worker: until then nothing waits in its stage
        self._num_doubts = 0
        self._leased: list[LeasedArrival] = []  # what came with wake-ups and has not begun
        self._chooser = Chooser(
            context,
            sessions=sessions,
            placement=placement,
            profile=profile,
            fleet_view=fleet_view,
            lease=lease,
            report=report,
        )

    async def keep_up(self) -> None:
        """What is to be done with each look at the fleet: a wake-up may have been missed."""
        self._private_due |= self._fleet_view.has_waiting(private_queue(self._context.worker_id))
        if self._fleet_view.is_stuck(str(self._placement.stage)):
            self.look_again()
        await self._chooser.tell()

    @property
    def idle_s(self) -> float:
        """How long to wait for a wake-up when nothing was taken."""
        if self._chooser.has_waiting:
            return _WAITING_S
        return _READY_S if self._is_ready else _IDLE_S

    @property
    def is_ready(self) -> bool:
        """Whether an arrival in the own stage wakes this worker: until then it need not look."""
        return self._is_ready

    @property
    def has_leased(self) -> bool:
        """Whether something came with a wake-up that has not begun."""
        return bool(self._leased)

    def look_again(self) -> None:
        """Look into the stage's queue with the next round: more may wait there than is known."""
        self._is_ready, self._num_doubts = False, self._num_doubts + 1

    def heed(self, wakeup: Wakeup) -> None:
        """Look with the next round where something may have come."""
        self._private_due |= wakeup in (Wakeup.PRIVATE, Wakeup.ANY)
        self._solo_due |= wakeup in (Wakeup.SOLO, Wakeup.ANY)
        self._is_rung |= wakeup is Wakeup.STAGE
        if wakeup in (Wakeup.STAGE, Wakeup.ANY):
            self.look_again()

    def begin(self, arrival: LeasedArrival) -> None:
        """Begin with the next round a request that is leased to this worker already."""
        self._leased.append(arrival)
        if not arrival.is_ready:
            self.look_again()
        self._sessions.wake()

    async def pull_once(self) -> int:
        """One round: our own queue, the solo queue when idle, the stage's queue, or else a sibling's.

        Before all, what is leased to this worker already. While it is to be empty for a request of the solo queue,
        nothing but that.
        """
        if self._leased:
            arrivals, self._leased, self._awaited = self._leased, [], None
            incarnation = self._lease.incarnation  # what another one had went back to its queue with that lease
            return await self._start_all([one.grant for one in arrivals if one.incarnation == incarnation])
        if await self._solo.look():
            self._is_ready = False
            await self._pass_on()
            if self._private_due:
                self._private_due = await self._solo.send_on()
            return await self._take_solo()
        if self._private_due:
            self._private_due = False
            if taken := await self._take_private():
                self._private_due = True  # there may be more
                return taken
        if await self._take_solo():
            return 1
        await self._background.preempt_background()
        room = self.room()
        if room.num_requests == 0:
            self._is_ready = False
            await self._pass_on()
            return 0
        room = self._without_newcomers(room)
        hold = self._background.hold(room)
        if taken := await self._take_queued(room, hold):
            self._awaited = None
            return taken
        return await self._steal(room, hold)

    async def _pass_on(self) -> None:
        """Wake another worker for an arrival that this one cannot take."""
        if self._is_rung:
            self._is_rung = False
            await self._context.executor.run(self._context.calls.ring(str(self._placement.stage)))

    async def _take_queued(self, room: AdmissionBudget, hold: BackgroundQuota) -> int:
        """From the stage's queue: by choice where that is on, else, and of the background, in order."""
        has_background = self._fleet_view.has_background(self._placement.stage)
        if self._is_ready and not (self._chooser.has_waiting or has_background):
            return 0
        self._is_rung = False
        if not self._chooser.is_on:
            return await self._take_own(room, hold)
        named = await self._chooser.choose(room)
        if not named and not self._chooser.has_waiting and has_background:
            return await self._take_own(room, hold)
        if not named and self._is_ready:
            return 0
        return await self._take_own(room, hold, named=named)

    async def _take_own(
        self, room: AdmissionBudget, hold: BackgroundQuota, *, named: Sequence[OwnChoice] | None = None
    ) -> int:
        """From the stage's queue, where the next arrival may wake this worker from then on; `named`: by choice."""
        stage, cost = str(self._placement.stage), self._profile.cost
        readiness = Readiness(
            backlog_ms=self._report.work_before_ms(),
            request_ms=cost.beta_ms,
            token_ms=cost.gamma_ms + cost.pi_ms,
            may_steal=bool(self._placement.sibling_stages),
            is_by_choice=named is not None,
        )
        num_sharers = None if named is None else 1
        return await self._take(
            stage, room, hold=hold, num_sharers=num_sharers, named=named or (), readiness=readiness
        )

    def _without_newcomers(self, room: AdmissionBudget) -> AdmissionBudget:
        if not self._fleet_view.num_queued(self._placement.stage):
            self._awaited = None
            return room
        self._awaited = still_awaited(self._awaited, self._sessions.ids())
        return room.without_newcomers(self._awaited)

    def room(self) -> AdmissionBudget:
        """What may be taken now, by the policy."""
        fleet_view, placement = self._fleet_view, self._placement
        state = AdmissionState.of(
            self._report.load(),
            longest_prefill_tokens=max(self._sessions.prefills, default=0),
            num_waiting=fleet_view.num_queued(placement.stage) / placement.num_sharers,
            remaining_tokens=fleet_view.outputs.mean_tokens if placement.is_l4 else None,
        )
        return admission_budget(state, cost=self._profile.cost)

    def pull_delay_s(self) -> float:
        """How long to let lighter workers of the stage take what this one has left there.

        What waits for this one alone waits no longer.
        """
        if self._private_due or self._placement.num_sharers < 2 or self._chooser.is_on:
            return 0.0
        lightest_ms = self._fleet_view.lightest_ms(self._placement.stage, cost=self._profile.cost)
        return pull_delay_ms(self._report.work_before_ms(), lightest_ms=lightest_ms) / 1000

    async def _take_solo(self) -> int:
        """One request that is to run alone, where nothing runs here."""
        if self._sessions or not (self._solo_due or self._fleet_view.num_solo):
            return 0
        self._solo_due = False
        taken = await self._take(SOLO_STAGE, _SOLO_ROOM)
        self._solo.taken()
        return taken

    async def _take_private(self) -> int:
        """What was handed over or pushed to this worker, up to its slots: whoever sent it looked at the room."""
        slots = self._profile.max_running - len(self._sessions)
        if slots < 1 or self._placement.is_draining:
            self._private_due = True  # it waits for a slot
            return 0
        room = unbounded_budget(slots, reason="meant for this worker")
        return await self._take(private_queue(self._context.worker_id), room, num_sharers=1)

    async def _take(
        self,
        stage: str,
        room: AdmissionBudget,
        *,
        hold: BackgroundQuota | None = None,
        num_sharers: int | None = None,
        price: tuple[float, float] = (0.0, 0.0),
        named: Sequence[OwnChoice] = (),
        readiness: Readiness | None = None,
    ) -> int:
        context, placement = self._context, self._placement
        taker = Taker(worker_id=context.worker_id, incarnation=self._lease.incarnation, stage=str(placement.stage))
        call = context.calls.take(
            stage,
            taker=taker,
            nonce=uuid.uuid4().hex,
            budget=room,
            hold=hold or self._background.no_quota,
            num_sharers=placement.num_sharers if num_sharers is None else num_sharers,
            benefit_ms=price[0],
            cost_ms=price[1],
            named=named,
            readiness=readiness,
        )
        doubts = self._num_doubts
        taken = await context.executor.run(call)
        if readiness is not None:  # it may have been woken since, though the reply comes only now
            self._is_ready = taken.is_ready and doubts == self._num_doubts
        if taken.verdict is Verdict.LOST:  # the next heartbeat begins a new incarnation
            return 0
        return await self._start_all(taken.grants)

    async def _start_all(self, grants: Sequence[Grant]) -> int:
        self._background.began(grants)
        await self.start(grants)
        return len(grants)

    async def _steal(self, room: AdmissionBudget, hold: BackgroundQuota) -> int:
        """Take waiting requests of a sibling stage if the policy says that it pays."""
        context = self._context
        if self._what_to_steal(room).stage is None:
            return 0
        if await context.executor.run(context.reads.num_foreground(str(self._placement.stage))) > 0:
            return 0  # what waits here is only too long to begin now: stealing would put it off further
        await self._fleet_view.refresh()  # by half a second's old news a queue could be emptied twice
        decision = self._what_to_steal(room)
        if decision.stage is None:
            return 0
        price = (decision.benefit_ms, decision.cost_ms)
        taken = await self._take(
            str(decision.stage), replace(room, num_requests=decision.num_requests), hold=hold, price=price
        )
        self._sessions.count_stolen(taken)
        return taken

    def _what_to_steal(self, room: AdmissionBudget) -> Steal:
        """The policy's decision by what was seen of the others last."""
        fleet_view = self._fleet_view
        none = Steal(stage=None, num_requests=0, benefit_ms=0.0, cost_ms=0.0, reason="one stage")
        if len(self._placement.plan.stages) < 2 or not self._placement.is_l4:
            return none
        loads = fleet_view.stage_loads(cost=self._profile.cost)
        own = next((load for load in loads if load.stage == self._placement.stage), None)
        if own is None or len(loads) < 2:
            return none
        return steal_waiting(
            self._report.load(),
            own=replace(own, queued_requests=0, queued_tokens=0),  # nothing there that could be taken
            siblings=loads,
            head_tokens={},
            max_requests=room.num_requests,
            expected_output_tokens=fleet_view.outputs.mean_tokens,
            cost=self._profile.cost,
            limits=self._context.steal_limits,
        )

    async def start(self, grants: Sequence[Grant]) -> None:
        """Hand leased requests to the engine; those that had ended before a crash are settled at once."""
        context = self._context
        resumed = [grant for grant in grants if grant.offset]
        outputs = await context.executor.run_many([context.reads.output(grant.request_id) for grant in resumed])
        earlier = {g.request_id: entries for g, entries in zip(resumed, outputs, strict=True)}
        ended = []
        for grant in grants:
            session = await self._open(grant, earlier.get(grant.request_id, []))
            if session is None or await self._rollback.is_second(session):
                continue
            watch_tokens = first_watch(
                session.length_tokens,
                high_tokens=self._placement.high_tokens,
                has_moved=bool(session.came_from),
            )
            self._sessions.add(session, watch_tokens=watch_tokens)
            context.observer.request_started(session.view)
            if session.has_ended:
                ended.append(session)
                continue
            if not grant.kv and has_prefill(session.prefill_tokens, self._profile.cost):
                await self._escape_before_prefill()
            if session.engine_id in self._sessions:  # it may have been cancelled meanwhile
                await context.work.steps(session.engine_id, context.engine.add(session.engine_request()))
        await self._writer.flush(ended)

    async def _open(self, grant: Grant, entries: Sequence[OutputEntry]) -> Session | None:
        context = self._context
        try:
            with context.work.on(engine_id(grant)):
                session = Session(
                    grant,
                    incarnation=self._lease.incarnation,
                    stage=self._placement.stage,
                    range_text=self._placement.range_text(self._placement.stage),
                    started_s=asyncio.get_running_loop().time(),
                    make_text=context.make_text,
                )
                session.resume(entries, eos_token_ids=self._profile.info.eos_token_ids)
        except ValueError as error:
            outcome = Outcome(state=RequestState.FAILED, finish_reason="invalid", error=str(error), field="body")
            if await self._writer.refuse(grant, outcome):
                unreadable = finding(context.keys.request(grant.request_id), error, (grant, entries))
                await context.executor.bury([unreadable])
            return None
        return session
