"""Moves of running requests: out of an outgrown stage, away from a long prefill, or to an idle sibling."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Iterable
from dataclasses import asdict
from typing import NoReturn

from l4queue.compat import FORMAT, object_of, value_of
from l4queue.models import Routing, WorkerLoad
from l4queue.policy.escape import MIN_PREFILL_MS, NUM_REFUGES, REST_MS, EscapeTarget, escapes, may_escape
from l4queue.policy.handover import decide_handover, least_loaded, look_again_at, next_stage
from l4queue.policy.steal import Ask, RunningRequest, ask, bid, choose_victim, match
from l4queue.protocol.calls import Move, MoveKind
from l4queue.protocol.keys import private_queue
from workers.loop.session import Session
from workers.loop.state import WorkerState
from workers.loop.task_set import TaskSet
from workers.loop.writer import Writer

__all__ = ("Mover",)

log = logging.getLogger("l4queue.worker")
_MAKE_WAY_S = 0.1
"""Longest wait for moves under way before a prefill begins, s. Chosen: two writes at the default interval."""
_ESCAPE_S = 0.1  # so often it is looked again while a prefill goes on


class Mover:
    """Decides by the policy, then moves: cut in the engine, write what there is, queue it for its new worker."""

    def __init__(self, state: WorkerState, writer: Writer) -> None:
        self._state = state
        self._writer = writer
        self._moves = TaskSet()
        self._last_steal_ms: int | None = None
        self._last_ask_ms: int | None = None
        self._is_due = asyncio.Event()
        self._escaped_s = 0.0

    def watch_anew(self) -> None:
        """A new plan: whatever is beyond the end of the range now is thought about with its next token."""
        for session in self._state.sessions.values():
            session.watch_tokens = self._state.high_tokens

    def look(self, sessions: Iterable[Session]) -> None:
        """Hand over what has outgrown the stage, and what a prefill would hold up, if that pays."""
        for session in sessions:
            watch = session.watch_tokens
            if watch is None or session.length_tokens < watch or not session.may_move:
                continue
            if self._state.plan.routing is Routing.L4 and len(self._moves) < self._state.steal_limits.max_moves:
                self._consider(session)
        pending_tokens = self._tell()
        is_due = asyncio.get_running_loop().time() >= self._escaped_s + _ESCAPE_S
        if is_due and self._may_escape(pending_tokens):
            self._is_due.set()

    async def escape_for_ever(self) -> NoReturn:
        """Look again who leaves, while prefill goes on here."""
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            await self._escape()

    def _tell(self) -> int:
        """Prefill that begins or ends here is news: siblings decide by it. Returns what is pending, tokens."""
        lease, cost, pending_tokens = self._state.lease, self._state.cost, self._state.pending_prefill_tokens
        told_tokens = lease.last_published.pending_prefill_tokens if lease.last_published else 0
        if abs(cost.prefill_ms(pending_tokens) - cost.prefill_ms(told_tokens)) >= MIN_PREFILL_MS:
            lease.tell()
        return pending_tokens

    def _may_escape(self, pending_tokens: int) -> bool:
        state = self._state
        is_on = state.plan.routing is Routing.L4 and state.settings.hand_over and state.settings.escape
        return (
            is_on
            and len(self._moves) < state.steal_limits.max_moves
            and may_escape(pending_tokens, cost=state.cost, price=state.move_price)
        )

    async def _escape(self) -> None:
        """Move running requests away from prefill that is before them here, to siblings with less."""
        state, fleet_view = self._state, self._state.fleet_view
        may = self._may_escape(state.pending_prefill_tokens) and any(s.may_move for s in state.sessions.values())
        others = fleet_view.others() if may else []
        if not others:
            return
        self._escaped_s = asyncio.get_running_loop().time()
        siblings = await fleet_view.asked_again(random.sample(others, min(NUM_REFUGES, len(others))))
        here = state.load()
        rested_s = asyncio.get_running_loop().time() - REST_MS / 1000
        by_id = {
            session.request_id: session
            for session in state.sessions.values()
            if session.may_move and not (session.came_from and session.started_s > rested_s)
        }
        for escape in escapes(
            [self._running(session) for session in by_id.values()],
            here=here,
            ahead_ms=self._ahead_ms(here),
            refuges=[EscapeTarget(load=load, ahead_ms=self._ahead_ms(load)) for load in siblings],
            moves_in_flight=len(self._moves),
            cost=state.cost,
            price=state.move_price,
            limits=state.steal_limits,
        ):
            state.num_handed_over += 1
            move = Move(kind=MoveKind.ESCAPE, benefit_ms=escape.benefit_ms, cost_ms=escape.cost_ms)
            self._begin(by_id[escape.request_id], escape.target_id, move)

    async def evacuate_before_prefill(self) -> None:
        """Before a prefill begins: let what it would hold up leave. Once it runs, a cut waits for its steps."""
        self._tell()
        await self._escape()
        await self._moves.rest(timeout_s=_MAKE_WAY_S)

    async def ask_once(self) -> None:
        """With room and nothing waiting anywhere: ask the most overloaded sibling for running requests."""
        state, fleet_view = self._state, self._state.fleet_view
        if state.plan.routing is not Routing.L4:
            return
        own = state.load()
        request = ask(
            own,
            num_waiting_anywhere=fleet_view.num_in_play,
            moves_in_flight=len(self._moves),
            last_move_ms=self._last_ask_ms,
            now_ms=_now_ms(),
            cost=state.cost,
            limits=state.steal_limits,
        )
        victim = choose_victim(own, fleet_view.others(), cost=state.cost, limits=state.steal_limits)
        if request is None or victim is None:
            return
        self._last_ask_ms = _now_ms()
        message = json.dumps({"v": FORMAT, "ask": asdict(request)})
        await state.executor.offer(state.calls.ask(victim.incarnation, message=message))

    def answer(self, message: str) -> None:
        """A sibling asks: move what pays to it. UnreadableValue where it asks what this release does not know."""
        state = self._state
        request = value_of(Ask, object_of(message, what="message").get("ask"), what="ask")
        offers = bid(
            state.load(),
            [self._running(session) for session in state.sessions.values() if session.may_move],
            request,
            moves_in_flight=len(self._moves),
            last_move_ms=self._last_steal_ms,
            now_ms=_now_ms(),
            cost=state.cost,
            price=state.move_price,
            limits=state.steal_limits,
        )
        by_id = {session.request_id: session for session in state.sessions.values()}
        bids = {offer.request_id: offer for offer in offers}
        moving = {state.worker_id: len(self._moves)}
        for transfer in match([request], offers, moves_in_flight=moving, limits=state.steal_limits):
            offer = bids[transfer.request_id]
            move = Move(kind=MoveKind.STEAL, benefit_ms=offer.benefit_ms, cost_ms=offer.cost_ms)
            self._last_steal_ms = _now_ms()
            self._begin(by_id[transfer.request_id], transfer.target_id, move)

    async def finish(self) -> None:
        """Wait for the moves in progress."""
        await self._moves.finish()

    async def failure(self) -> NoReturn:
        """Wait for a move that fails, and raise what it raised: its request stands still until given back."""
        await self._moves.failure()

    def _consider(self, session: Session) -> None:
        state = self._state
        stage = next_stage(state.stage, session.length_tokens, state.plan)
        siblings = state.fleet_view.others(stage=stage)
        there = least_loaded(siblings, cost=state.cost, holders=(session.came_from,))
        here = state.load()
        decision = decide_handover(
            session.length_tokens,
            high_tokens=state.high_tokens,
            expected_remaining_tokens=state.expected_remaining(session),
            here=here,
            there=there,
            cost=state.cost,
            price=state.move_price,
            ahead_here_ms=self._ahead_ms(here),
            ahead_there_ms=self._ahead_ms(there) if there else 0.0,
        )
        if not decision.is_move or there is None:
            session.watch_tokens = look_again_at(session.length_tokens)
            return
        state.num_handed_over += 1
        move = Move(kind=MoveKind.HANDOVER, benefit_ms=decision.benefit_ms, cost_ms=decision.cost_ms)
        self._begin(session, there.worker_id, move)

    def _ahead_ms(self, load: WorkerLoad) -> float:
        """Prefill before what that worker runs, by what is known of its stage's queue."""
        fleet_view = self._state.fleet_view
        return fleet_view.ahead_ms(load.pending_prefill_tokens, fleet_view.stage_of(load), cost=self._state.cost)

    def _begin(self, session: Session, target_id: str, move: Move) -> None:
        session.is_moving = True
        self._moves.start(self._move(session, target_id, move))

    async def _move(self, session: Session, target_id: str, move: Move) -> None:
        """Cut, write, release. What fails on the way ends the worker, which gives the request back."""
        state = self._state
        cut = await state.cut(session)
        if cut is None:  # its end is on the way, or the engine's
            session.is_moving = False
            return
        await self._writer.flush([session])
        if session.engine_id not in state.sessions:  # it had ended, or was taken from us meanwhile
            return
        call = state.calls.release(
            session.request_id,
            incarnation=session.incarnation,
            epoch=session.grant.epoch,
            stage=private_queue(target_id),
            move=Move(kind=move.kind, benefit_ms=move.benefit_ms, cost_ms=move.cost_ms, kv=cut.kv),
        )
        await state.executor.run(call)
        if state.sessions.pop(session.engine_id, None) is not None:
            state.observer.request_moved(state.view(session), why=f"{move.kind}: on to {target_id}")
        state.nudge.set()
        log.info("%s of %s at %d tokens to %s", move.kind, session.request_id, session.length_tokens, target_id)

    def _running(self, session: Session) -> RunningRequest:
        return RunningRequest(
            request_id=session.request_id,
            length_tokens=session.length_tokens,
            expected_remaining_tokens=self._state.expected_remaining(session),
            came_from=session.came_from or None,
        )


def _now_ms() -> int:
    return int(asyncio.get_running_loop().time() * 1000)
