"""Taking work: how much there is room for, from which queue, and how it starts or resumes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace

from pydantic import ValidationError

from l4queue.models import RequestState
from l4queue.policy.room import Room, RoomLimits, room_of
from l4queue.policy.steal import steal_waiting
from l4queue.protocol.calls import Verdict
from l4queue.protocol.keys import SOLO_STAGE
from l4queue.protocol.records import Grant, Outcome, OutputEntry
from workers.session import Session
from workers.siblings import expected_output_tokens, stage_loads
from workers.state import WorkerState
from workers.writer import Writer

__all__ = ("Intake",)

log = logging.getLogger("l4queue.worker")
_SOLO_PATIENCE_S = 5.0
_PREFILL_STEPS = 2  # prompts of two steps wait in the engine: it never runs dry, and little is out of reach
_IDLE_ROOM = Room(
    num_requests=1, kv_tokens=2**53, prefill_tokens=2**53, growth_tokens=0, is_idle=True, reason="runs alone"
)


class Intake:
    """Takes from the own queue, then from siblings. `pull_once` returns how many requests it took."""

    def __init__(self, state: WorkerState, writer: Writer) -> None:
        self._state = state
        self._writer = writer
        self._solo_since_s: float | None = None

    async def pull_once(self) -> int:
        """One round: the solo queue when we are idle, the own queue, a sibling's when ours is empty."""
        state = self._state
        if not state.sessions and await self._take(SOLO_STAGE, _IDLE_ROOM):
            self._solo_since_s = None
            return 1
        if await self._must_make_way():
            return 0
        room = self.room()
        if room.num_requests == 0:
            return 0
        return await self._take(str(state.stage), room) or await self._steal(room)

    def room(self) -> Room:
        """What may be taken now, by the policy."""
        state, info = self._state, self._state.engine_info
        pending = sum(s.grant.prompt_tokens for s in state.sessions.values() if s.awaits_first_token)
        limits = RoomLimits(prefill_tokens=_PREFILL_STEPS * info.max_batched_tokens)
        return room_of(state.load(), cost=state.cost, limits=limits, pending_prefill_tokens=pending)

    async def _take(self, stage: str, room: Room) -> int:
        state = self._state
        call = state.calls.take(
            stage,
            incarnation=state.lease.incarnation,
            worker_id=state.worker_id,
            nonce=uuid.uuid4().hex,
            max_requests=room.num_requests,
            room_tokens=min(room.kv_tokens, 2**53),
            reserve_tokens=room.growth_tokens,
            prefill_tokens=room.prefill_tokens,
            is_idle=room.is_idle,
            num_sharers=state.num_sharers,
        )
        taken = await state.door.run(call)
        if taken.verdict is Verdict.LOST:  # the next heartbeat begins a new incarnation
            return 0
        await self.start(taken.grants)
        return len(taken.grants)

    async def _steal(self, room: Room) -> int:
        """Take waiting requests of a sibling stage if the policy says that it pays."""
        state, overview = self._state, self._state.overview
        if overview is None or len(overview.plan.stages) < 2 or len(state.plan.stages) < 2:
            return 0
        loads = stage_loads(overview, cost=state.cost)
        own = next((load for load in loads if load.stage == state.stage), None)
        if own is None:
            return 0
        decision = steal_waiting(
            state.load(),
            own=replace(own, queued_requests=0, queued_tokens=0),  # just found empty
            siblings=loads,
            head_tokens={},
            max_requests=room.num_requests,
            expected_output_tokens=expected_output_tokens(overview),
            cost=state.cost,
        )
        if decision.stage is None:
            return 0
        taken = await self._take(str(decision.stage), replace(room, num_requests=decision.num_requests))
        state.num_stolen += taken
        return taken

    async def _must_make_way(self) -> bool:
        """Whether to run empty so that a request of the solo queue gets its turn: one worker does, the first."""
        state = self._state
        now_s = asyncio.get_running_loop().time()
        if await state.door.run(self._state.reads.queue_length(SOLO_STAGE)) == 0:
            self._solo_since_s = None
            return False
        self._solo_since_s = self._solo_since_s or now_s
        if now_s - self._solo_since_s < _SOLO_PATIENCE_S:
            return False
        incarnations = await state.door.run(self._state.reads.incarnations())
        return state.lease.incarnation == min((name for name, _ in incarnations), default="")

    async def start(self, grants: Sequence[Grant]) -> None:
        """Hand leased requests to the engine; those that had ended before a crash are settled at once."""
        state = self._state
        resumed = [grant for grant in grants if grant.offset]
        outputs = await state.door.run_many([self._state.reads.output(grant.request_id) for grant in resumed])
        earlier = {g.request_id: entries for g, entries in zip(resumed, outputs, strict=True)}
        ended = []
        for grant in grants:
            session = await self._open(grant, earlier.get(grant.request_id, []))
            if session is None:
                continue
            state.sessions[session.engine_id] = session
            state.observer.request_started(state.view(session))
            if session.has_ended:
                ended.append(session)
            else:
                await state.engine.add(session.engine_request())
        await self._writer.flush(ended)

    async def _open(self, grant: Grant, entries: Sequence[OutputEntry]) -> Session | None:
        state = self._state
        try:
            session = Session(
                grant,
                incarnation=state.lease.incarnation,
                stage=state.stage,
                range_text=state.range_text(state.stage),
                started_s=asyncio.get_running_loop().time(),
                make_text=state.make_text,
            )
        except ValidationError as error:
            outcome = Outcome(state=RequestState.FAILED, finish_reason="invalid", error=str(error), field="body")
            await self._writer.refuse(grant, outcome)
            return None
        session.resume(entries, eos_token_ids=state.engine_info.eos_token_ids)
        return session
