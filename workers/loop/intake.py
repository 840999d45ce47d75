"""Intake: which requests a worker takes, from which queue, and how each starts or resumes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from l4queue.models import UNBOUNDED_TOKENS, RequestState, Routing
from l4queue.policy.admission import (
    AdmissionBudget,
    AdmissionLimits,
    admission_budget,
    pull_delay_ms,
)
from l4queue.policy.escape import has_prefill
from l4queue.policy.handover import look_again_at
from l4queue.policy.loads import batch_ms
from l4queue.policy.steal import Steal, steal_waiting
from l4queue.protocol.calls import Verdict
from l4queue.protocol.foreign import finding
from l4queue.protocol.keys import SOLO_STAGE, private_queue
from l4queue.protocol.records import BackgroundQuota, Grant, Outcome, OutputEntry
from workers.loop.background import BackgroundWork
from workers.loop.rollback import Rollback
from workers.loop.session import Session, engine_id
from workers.loop.solo import SoloTurn
from workers.loop.state import WorkerState
from workers.loop.writer import Writer

__all__ = ("Intake",)

log = logging.getLogger("l4queue.worker")
_PREFILL_STEPS = 2  # prompts of two steps wait in the engine: it never runs dry, and little is out of reach
_LONG_PREFILL_STEPS = 1  # beside a prompt of many steps nothing waits: others can take it, and there is time
_IDLE_ROOM = AdmissionBudget(
    num_requests=1,
    kv_tokens=UNBOUNDED_TOKENS,
    prefill_tokens=UNBOUNDED_TOKENS,
    growth_tokens=0,
    is_idle=True,
    reason="runs alone",
)


class Intake:
    """Takes from the own queue, then from siblings. `pull_once` returns how many requests it took."""

    def __init__(
        self,
        state: WorkerState,
        writer: Writer,
        rollback: Rollback,
        *,
        evacuate_before_prefill: Callable[[], Awaitable[None]],
    ) -> None:
        """`evacuate_before_prefill` is awaited before a prompt begins whose prefill holds up what runs."""
        self._state = state
        self._writer = writer
        self._background = BackgroundWork(state, writer)
        self._rollback = rollback
        self._evacuate_before_prefill = evacuate_before_prefill
        self._solo = SoloTurn(state, writer)
        self._waits_for: frozenset[str] | None = None  # what ran when the queue was last found to wait
        self.private_due = True  # something may wait for this worker alone

    async def pull_once(self) -> int:
        """One round: our own queue, the solo queue when idle, the stage's queue, or else a sibling's.

        While this worker is to be empty for a request of the solo queue, nothing but that.
        """
        state = self._state
        if await self._solo.look():
            if self.private_due:
                self.private_due = await self._solo.send_on()
            return await self._take_solo()
        if self.private_due:
            self.private_due = False
            if taken := await self._take_private():
                self.private_due = True  # there may be more
                return taken
        if await self._take_solo():
            return 1
        await self._background.preempt_background()
        room = self.room()
        if room.num_requests == 0:
            return 0
        room = self._without_newcomers(room)
        hold = self._background.hold(room)
        if taken := await self._take(str(state.stage), room, hold=hold):
            self._waits_for = None
            return taken
        return await self._steal(room, hold)

    def _without_newcomers(self, room: AdmissionBudget) -> AdmissionBudget:
        """A prompt that waits for what runs to end waits for what ran when it began to, not for hand-overs."""
        state = self._state
        if not state.fleet_view.num_queued(state.stage):
            self._waits_for = None
            return room
        here = frozenset(state.sessions)
        self._waits_for = here if self._waits_for is None else self._waits_for & here
        return room if self._waits_for else replace(room, longest_tokens=UNBOUNDED_TOKENS)

    def room(self) -> AdmissionBudget:
        """What may be taken now: by the policy, and a step of prefill at a time: a long prompt is seen first."""
        state, info, fleet_view = self._state, self._state.engine_info, self._state.fleet_view
        is_ours = state.plan.routing is Routing.L4
        has_long = max(state.prefills, default=0) > info.max_batched_tokens
        limits = AdmissionLimits(
            prefill_tokens=(_LONG_PREFILL_STEPS if has_long else _PREFILL_STEPS) * info.max_batched_tokens,
            remaining_tokens=fleet_view.outputs.mean_tokens if is_ours else None,
        )
        waiting = fleet_view.num_queued(state.stage) / state.num_sharers
        room = admission_budget(state.load(), cost=state.cost, limits=limits, num_waiting=waiting)
        return replace(room, prefill_tokens=min(room.prefill_tokens, info.max_batched_tokens))

    def pull_delay_s(self) -> float:
        """How long to let other workers of the stage go first; what waits for this one alone waits no longer."""
        state = self._state
        if self.private_due or state.num_sharers < 2:
            return 0.0
        lightest_ms = state.fleet_view.lightest_ms(state.stage, cost=state.cost)
        return pull_delay_ms(batch_ms(state.load(), cost=state.cost), lightest_ms=lightest_ms) / 1000

    async def _take_solo(self) -> int:
        """One request that is to run alone, where nothing runs here."""
        if self._state.sessions:
            return 0
        taken = await self._take(SOLO_STAGE, _IDLE_ROOM)
        self._solo.taken()
        return taken

    async def _take_private(self) -> int:
        """What was handed over or pushed to this worker, up to its slots: whoever sent it looked at the room."""
        state = self._state
        slots = state.max_running - len(state.sessions)
        if slots < 1 or state.is_draining:
            self.private_due = True  # it waits for a slot
            return 0
        room = replace(_IDLE_ROOM, num_requests=slots, reason="meant for this worker")
        return await self._take(private_queue(state.worker_id), room, num_sharers=1)

    async def _take(
        self,
        stage: str,
        room: AdmissionBudget,
        *,
        hold: BackgroundQuota | None = None,
        num_sharers: int | None = None,
        price: tuple[float, float] = (0.0, 0.0),
    ) -> int:
        state = self._state
        call = state.calls.take(
            stage,
            incarnation=state.lease.incarnation,
            worker_id=state.worker_id,
            nonce=uuid.uuid4().hex,
            max_requests=room.num_requests,
            room_tokens=min(room.kv_tokens, UNBOUNDED_TOKENS),
            reserve_tokens=room.growth_tokens,
            prefill_tokens=room.prefill_tokens,
            is_idle=room.is_idle,
            num_sharers=state.num_sharers if num_sharers is None else num_sharers,
            own_stage=str(state.stage),
            benefit_ms=price[0],
            cost_ms=price[1],
            longest_tokens=room.longest_tokens,
            hold=hold or self._background.no_quota,
        )
        taken = await state.executor.run(call)
        if taken.verdict is Verdict.LOST:  # the next heartbeat begins a new incarnation
            return 0
        self._background.began(taken.grants)
        await self.start(taken.grants)
        return len(taken.grants)

    async def _steal(self, room: AdmissionBudget, hold: BackgroundQuota) -> int:
        """Take waiting requests of a sibling stage if the policy says that it pays."""
        state = self._state
        if self._what_to_steal(room).stage is None:
            return 0
        if await state.executor.run(state.reads.num_foreground(str(state.stage))) > 0:
            return 0  # what waits here is only too long to begin now: stealing would put it off further
        await state.fleet_view.refresh()  # by half a second's old news a queue could be emptied twice
        decision = self._what_to_steal(room)
        if decision.stage is None:
            return 0
        price = (decision.benefit_ms, decision.cost_ms)
        taken = await self._take(
            str(decision.stage), replace(room, num_requests=decision.num_requests), hold=hold, price=price
        )
        state.num_stolen += taken
        return taken

    def _what_to_steal(self, room: AdmissionBudget) -> Steal:
        """The policy's decision by what was seen of the others last."""
        state, fleet_view = self._state, self._state.fleet_view
        none = Steal(stage=None, num_requests=0, benefit_ms=0.0, cost_ms=0.0, reason="one stage")
        if len(state.plan.stages) < 2 or state.plan.routing is not Routing.L4:
            return none
        loads = fleet_view.stage_loads(cost=state.cost)
        own = next((load for load in loads if load.stage == state.stage), None)
        if own is None or len(loads) < 2:
            return none
        return steal_waiting(
            state.load(),
            own=replace(own, queued_requests=0, queued_tokens=0),  # nothing there that could be taken
            siblings=loads,
            head_tokens={},
            max_requests=room.num_requests,
            expected_output_tokens=fleet_view.outputs.mean_tokens,
            cost=state.cost,
            limits=state.steal_limits,
        )

    async def start(self, grants: Sequence[Grant]) -> None:
        """Hand leased requests to the engine; those that had ended before a crash are settled at once."""
        state = self._state
        resumed = [grant for grant in grants if grant.offset]
        outputs = await state.executor.run_many([self._state.reads.output(grant.request_id) for grant in resumed])
        earlier = {g.request_id: entries for g, entries in zip(resumed, outputs, strict=True)}
        ended = []
        for grant in grants:
            session = await self._open(grant, earlier.get(grant.request_id, []))
            if session is None or await self._rollback.is_second(session):
                continue
            state.sessions[session.engine_id] = session
            session.watch_tokens = _first_watch(session, state.high_tokens)
            state.observer.request_started(state.view(session))
            if session.has_ended:
                ended.append(session)
                continue
            if not grant.kv and has_prefill(session.length_tokens, state.cost):
                await self._evacuate_before_prefill()
            if session.engine_id in state.sessions:  # it may have been cancelled meanwhile
                await state.work.steps(session.engine_id, state.engine.add(session.engine_request()))
        await self._writer.flush(ended)

    async def _open(self, grant: Grant, entries: Sequence[OutputEntry]) -> Session | None:
        state = self._state
        try:
            with state.work.on(engine_id(grant)):
                session = Session(
                    grant,
                    incarnation=state.lease.incarnation,
                    stage=state.stage,
                    range_text=state.range_text(state.stage),
                    started_s=asyncio.get_running_loop().time(),
                    make_text=state.make_text,
                )
                session.resume(entries, eos_token_ids=state.engine_info.eos_token_ids)
        except ValueError as error:
            outcome = Outcome(state=RequestState.FAILED, finish_reason="invalid", error=str(error), field="body")
            await self._writer.refuse(grant, outcome)
            await state.executor.bury([finding(state.keys.request(grant.request_id), error, (grant, entries))])
            return None
        return session


def _first_watch(session: Session, high_tokens: int | None) -> int | None:
    """Length at which moving it is thought about: the end of the range; much later if it was moved beyond that."""
    if high_tokens is not None and session.came_from and session.length_tokens >= high_tokens:
        return look_again_at(session.length_tokens)
    return high_tokens
