"""Moves of running requests: out of an outgrown stage, away from a long prefill, or to an idle sibling."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import NoReturn

from l4queue.compat import FORMAT, object_of, value_of
from l4queue.cost.move import MovePrice
from l4queue.models import WorkerLoad
from l4queue.policy.escape import (
    MIN_PREFILL_MS,
    REST_MS,
    EscapeTarget,
    escapes,
    may_escape,
    sample_siblings,
)
from l4queue.policy.handover import decide_handover, least_loaded, look_again_at, next_stage
from l4queue.policy.steal import Ask, RunningRequest, ask, bid, choose_victim, match
from l4queue.protocol.calls import Move, MoveKind
from l4queue.protocol.keys import private_queue
from workers.loop.context import WorkerContext
from workers.loop.engine_profile import EngineProfile
from workers.loop.fleet_view import FleetView
from workers.loop.lease import Lease
from workers.loop.placement import Placement
from workers.loop.report import WorkerReport
from workers.loop.session import Session
from workers.loop.sessions import Sessions
from workers.loop.task_set import TaskSet
from workers.loop.writer import Writer

__all__ = ("Mover",)

log = logging.getLogger("l4queue.moves")
_MAKE_WAY_S = 0.1
"""Longest wait for moves under way before a prefill begins, s. Chosen: two writes at the default interval."""
_ESCAPE_S = 0.1  # between two looks while a prefill goes on


class Mover:
    """Decides by the policy, then moves: cut in the engine, write what there is, queue it for its new worker."""

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
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._placement = placement
        self._profile = profile
        self._fleet_view = fleet_view
        self._lease = lease
        self._report = report
        self._writer = writer
        self._moves = TaskSet()
        self._uncopied: set[Session] = set()  # on their way out, and their KV caches take no room yet
        self._last_steal_ms: int | None = None
        self._last_ask_ms: int | None = None
        self._is_due = asyncio.Event()
        self._escaped_s = 0.0

    def watch_anew(self) -> None:
        """A new plan: whatever is beyond the end of the range now is thought about with its next token."""
        self._sessions.watch_all(from_tokens=self._placement.high_tokens)

    def look(self, sessions: Iterable[Session]) -> None:
        """Hand over what has outgrown the stage, and what a prefill would hold up, if that pays."""
        for session in sessions:
            watch = session.watch_tokens
            if watch is None or session.length_tokens < watch or not session.may_move:
                continue
            if self._placement.is_l4 and len(self._moves) < self._context.steal_limits.max_moves:
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
        lease, cost, pending_tokens = self._lease, self._profile.cost, self._sessions.pending_prefill_tokens
        told_tokens = lease.last_published.pending_prefill_tokens if lease.last_published else 0
        if abs(cost.prefill_ms(pending_tokens) - cost.prefill_ms(told_tokens)) >= MIN_PREFILL_MS:
            lease.tell()
        return pending_tokens

    def _may_escape(self, pending_tokens: int) -> bool:
        context = self._context
        is_on = self._placement.is_l4 and context.settings.hand_over and context.settings.escape
        return (
            is_on
            and len(self._moves) < context.steal_limits.max_moves
            and may_escape(pending_tokens, cost=self._profile.cost, price=self._profile.move_price)
        )

    async def _escape(self) -> None:
        """Move running requests away from prefill that is before them here, to siblings with less."""
        context, fleet_view = self._context, self._fleet_view
        may = self._may_escape(self._sessions.pending_prefill_tokens) and any(s.may_move for s in self._sessions)
        others = fleet_view.others() if may else []
        if not others:
            return
        self._escaped_s = asyncio.get_running_loop().time()
        siblings = await fleet_view.asked_again(sample_siblings(others, draw=_draw))
        here = self._report.load()
        rested_s = asyncio.get_running_loop().time() - REST_MS / 1000
        by_id = {
            session.request_id: session
            for session in self._sessions
            if session.may_move and not (session.came_from and session.started_s > rested_s)
        }
        for escape in escapes(
            [self._running(session) for session in by_id.values()],
            here=here,
            ahead_ms=self._ahead_ms(here),
            targets=[EscapeTarget(load=load, ahead_ms=self._ahead_ms(load)) for load in siblings],
            moves_in_flight=len(self._moves),
            cost=self._profile.cost,
            price=self._price_now(),
            limits=context.steal_limits,
        ):
            move = Move(kind=MoveKind.ESCAPE, benefit_ms=escape.benefit_ms, cost_ms=escape.cost_ms)
            self._begin(by_id[escape.request_id], escape.target_id, move)

    async def escape_before_prefill(self) -> None:
        """Before a prefill begins: let what it would hold up leave. Once it runs, a cut waits for its steps."""
        self._tell()
        await self._escape()
        await self._moves.rest(timeout_s=_MAKE_WAY_S)

    async def ask_once(self) -> None:
        """With room and nothing waiting anywhere: ask the most overloaded sibling for running requests."""
        context, fleet_view = self._context, self._fleet_view
        if not self._placement.is_l4:
            return
        own = self._report.load()
        request = ask(
            own,
            num_waiting_anywhere=fleet_view.num_in_play,
            moves_in_flight=len(self._moves),
            last_move_ms=self._last_ask_ms,
            now_ms=_now_ms(),
            cost=self._profile.cost,
            limits=context.steal_limits,
        )
        victim = choose_victim(own, fleet_view.others(), cost=self._profile.cost, limits=context.steal_limits)
        if request is None or victim is None:
            return
        self._last_ask_ms = _now_ms()
        message = json.dumps({"v": FORMAT, "ask": asdict(request)})
        await context.executor.offer(context.calls.ask(victim.incarnation, message=message))

    def answer(self, message: str) -> None:
        """A sibling asks: move what pays to it. UnreadableValue where it asks what this release does not know."""
        context = self._context
        request = value_of(Ask, object_of(message, what="message").get("ask"), what="ask")
        offers = bid(
            self._report.load(),
            [self._running(session) for session in self._sessions if session.may_move],
            request,
            moves_in_flight=len(self._moves),
            last_move_ms=self._last_steal_ms,
            now_ms=_now_ms(),
            cost=self._profile.cost,
            price=self._price_now(),
            limits=context.steal_limits,
        )
        by_id = {session.request_id: session for session in self._sessions}
        bids = {offer.request_id: offer for offer in offers}
        moving = {context.worker_id: len(self._moves)}
        for transfer in match([request], offers, moves_in_flight=moving, limits=context.steal_limits):
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
        stage = next_stage(self._placement.stage, session.length_tokens, self._placement.plan)
        siblings = self._fleet_view.others(stage=stage)
        there = least_loaded(siblings, cost=self._profile.cost, holders=(session.came_from,))
        here = self._report.load()
        decision = decide_handover(
            session.length_tokens,
            high_tokens=self._placement.high_tokens,
            expected_remaining_tokens=self._fleet_view.expected_remaining(session),
            here=here,
            there=there,
            cost=self._profile.cost,
            price=self._price_now(),
            ahead_here_ms=self._ahead_ms(here),
            ahead_there_ms=self._ahead_ms(there) if there else 0.0,
        )
        if not decision.is_move or there is None:
            self._sessions.watch(session, from_tokens=look_again_at(session.length_tokens))
            return
        move = Move(kind=MoveKind.HANDOVER, benefit_ms=decision.benefit_ms, cost_ms=decision.cost_ms)
        self._begin(session, there.worker_id, move)

    def _ahead_ms(self, load: WorkerLoad) -> float:
        """Prefill before what that worker runs, by what is known of its stage's queue."""
        fleet_view = self._fleet_view
        return fleet_view.ahead_ms(load.pending_prefill_tokens, fleet_view.stage_of(load), cost=self._profile.cost)

    def _price_now(self) -> MovePrice:
        """Price of a move that begins now, beside those that have begun."""
        price = self._profile.price_now()
        for session in self._uncopied:
            price = price.after(session.length_tokens)
        return price

    def _begin(self, session: Session, target_id: str, move: Move) -> None:
        self._sessions.begin_move(session, move.kind)
        self._uncopied.add(session)
        self._moves.start(self._move(session, target_id, move))

    async def _move(self, session: Session, target_id: str, move: Move) -> None:
        """Cut, write, release. What fails on the way ends the worker, which gives the request back."""
        context = self._context
        cut = await self._writer.cut(session)
        self._uncopied.discard(session)
        if cut is None:  # its end is on the way, or the engine's
            self._sessions.end_move(session)
            return
        await self._writer.flush([session])
        if session.engine_id not in self._sessions:  # it had ended, or was taken from us meanwhile
            return
        call = context.calls.release(
            session.request_id,
            incarnation=session.incarnation,
            epoch=session.grant.epoch,
            stage=private_queue(target_id),
            move=replace(move, kv=cut.kv),
        )
        await context.executor.run(call)
        if self._sessions.drop(session):
            context.observer.request_moved(session.view, why=f"{move.kind}: on to {target_id}")
        self._sessions.wake()
        log.info("%s of %s at %d tokens to %s", move.kind, session.request_id, session.length_tokens, target_id)

    def _running(self, session: Session) -> RunningRequest:
        return RunningRequest(
            request_id=session.request_id,
            length_tokens=session.length_tokens,
            expected_remaining_tokens=self._fleet_view.expected_remaining(session),
            came_from=session.came_from or None,
        )


def _draw(num_all: int, num_drawn: int) -> list[int]:
    return random.sample(range(num_all), num_drawn)


def _now_ms() -> int:
    return int(asyncio.get_running_loop().time() * 1000)
