"""Writes of generated tokens: one round trip for all requests, every verdict of the fence obeyed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from uuid import uuid4

from l4queue.models import RequestState
from l4queue.policy.prefix_affinity import is_worth_telling
from l4queue.policy.prefix_blocks import MOST_TOLD, block_keys
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.records import Grant, Outcome
from workers.engine.base import Cut, EngineDied
from workers.engine.loop_work import lease_of
from workers.loop.context import WorkerContext
from workers.loop.fleet_view import FleetView
from workers.loop.lease import Lease
from workers.loop.placement import Placement
from workers.loop.session import Session, Write
from workers.loop.sessions import Sessions
from workers.telemetry.observer import LEASE_ENDED, RequestView

__all__ = ("Writer",)

log = logging.getLogger("l4queue.worker")


class Writer:
    """Turns writes of sessions into calls and their verdicts into consequences; ends sessions in the engine."""

    def __init__(
        self,
        context: WorkerContext,
        *,
        sessions: Sessions,
        placement: Placement,
        fleet_view: FleetView,
        lease: Lease,
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._placement = placement
        self._fleet_view = fleet_view
        self._lease = lease
        self._in_order = asyncio.Lock()

    async def flush(self, sessions: Sequence[Session]) -> None:
        """Write all pending output of these sessions, and settle the ended ones.

        One at a time: two writes of one request on two connections could arrive in the wrong order.
        """
        async with self._in_order:
            await self._flush(sessions)

    async def _flush(self, sessions: Sequence[Session]) -> None:
        writes = [write for session in sessions if (write := session.take_write()) is not None]
        if not writes:
            return
        writes.sort(key=lambda write: write.outcome is not None)  # neighbours of one script share a call
        stopped = [w.session for w in writes if w.session.ended_by_text]
        if stopped:  # the engine knows nothing of stop strings and would go on
            await self._abort(stopped)
        verdicts = await self._context.executor.run_many([self._call(write) for write in writes])
        lost = []
        for write, verdict in zip(writes, verdicts, strict=True):
            if verdict in (Verdict.OK, Verdict.DUP):
                if write.outcome is not None:
                    self._settled(write.session, write.outcome)
            else:
                if verdict is not Verdict.FENCED:
                    log.error("output of %s out of step: %s", write.session.request_id, verdict)
                lost.append(write.session)
        await self.drop(lost)

    async def give_back(
        self, sessions: Sequence[Session], *, why: str, blame: bool = False, culprit: str | None = None
    ) -> None:
        """Return these running requests with their progress: with blame after a crash of the engine.

        `culprit` is the id in the engine of one that gets it all the same.
        """
        context = self._context
        if culprit is not None and culprit not in self._sessions:  # it had not begun
            await context.executor.run(self._blame(culprit))
        if not sessions:
            return
        for session in sessions:
            self._sessions.begin_move(session)
        await self._abort(sessions)
        await self.flush(sessions)
        left = [session for session in sessions if session.engine_id in self._sessions]
        calls = [
            context.calls.release(
                session.request_id,
                incarnation=session.incarnation,
                epoch=session.grant.epoch,
                blame=blame or session.engine_id == culprit,
                max_crashes=context.settings.max_crashes,
            )
            for session in left
        ]
        await context.executor.run_many(calls)
        for session in left:
            if self._sessions.drop(session):
                context.observer.request_moved(session.view, why=why)
        ids = ",".join(session.request_id for session in left)
        log.info("gave back %d requests: %s", len(left), why, extra={"request_ids": ids})

    async def give_back_lost(self, sessions: Sequence[Session]) -> None:
        """Return requests that the engine has dropped and that have not ended by their text meanwhile.

        With blame where they would begin again: an engine that never keeps them does not get them for ever.
        """
        left = [s for s in sessions if s.engine_id in self._sessions and not s.has_ended]
        stuck = [s for s in left if s.params.is_pinned or s.awaits_first_token]
        await self.give_back([s for s in left if s not in stuck], why="the engine lost it")
        await self.give_back(stuck, why="the engine lost it before its first token", blame=True)

    async def refuse(self, grant: Grant, outcome: Outcome) -> bool:
        """Settle a request that cannot even start; False where its lease is lost: others have gone on with it."""
        context = self._context
        call = context.calls.settle(
            grant.request_id,
            incarnation=self._lease.incarnation,
            epoch=grant.epoch,
            offset=grant.offset,
            token_ids=(),
            text="",
            outcome=outcome,
        )
        return await context.executor.run(call) is not Verdict.FENCED

    async def cut(self, session: Session) -> Cut | None:
        """Stop computing this one at a token boundary; None when it does not run any more."""
        try:
            return await self._context.engine.cut(session.engine_id)
        except EngineDied:
            return None

    async def drop(self, sessions: Iterable[Session]) -> None:
        """Stop computing requests that are no longer ours; tell the observer what became of them."""
        context = self._context
        gone = [session for session in sessions if self._sessions.drop(session)]
        if not gone:
            return
        await self._abort(gone)
        self._sessions.wake()
        records = await context.executor.run_many([context.reads.record(session.request_id) for session in gone])
        for session, record in zip(gone, records, strict=True):
            if record is not None and record.state in ("cancelled", "expired"):
                context.observer.request_cancelled(session.view)
            else:
                context.observer.request_moved(session.view, why=LEASE_ENDED)

    async def cancel(self, request_id: str) -> None:
        """Cancel a request wherever it is. Many workers may be asked; the one that does it tells the observer.

        A request that runs is reported by the worker that runs it, as soon as it hears of it.
        """
        context = self._context
        record = await context.executor.run(context.reads.record(request_id))
        call = context.calls.cancel(request_id, reason="revoked", nonce=uuid4().hex)
        verdict, _ = await context.executor.run(call)
        if verdict is Verdict.OK and record is not None and record.state is not RequestState.RUNNING:
            stage = int(record.stage) if record.stage is not None and record.stage.isdecimal() else 0
            view = RequestView(
                request_id=request_id,
                stage=stage,
                range_text=self._placement.range_text(stage),
                prompt_tokens=record.prompt_tokens or 0,
                max_tokens=record.max_tokens or 0,
                num_resumed=record.offset,
                epoch=record.epoch,
                submitted_ms=record.submitted_ms,
                is_traced="traceparent" in record.body,
            )
            context.observer.request_cancelled(view)

    async def _abort(self, sessions: Iterable[Session]) -> None:
        """Stop computing these; a dead engine has stopped already."""
        try:
            await self._context.engine.abort([session.engine_id for session in sessions])
        except EngineDied:
            return

    def _blame(self, engine_id: str) -> Call[Verdict]:
        context, (request_id, epoch) = self._context, lease_of(engine_id)
        return context.calls.release(
            request_id,
            incarnation=self._lease.incarnation,
            epoch=epoch,
            blame=True,
            max_crashes=context.settings.max_crashes,
        )

    def _call(self, write: Write) -> Call[Verdict]:
        calls, session = self._context.calls, write.session
        make: Callable[..., Call[Verdict]] = calls.emit
        if write.outcome is not None:
            make = partial(calls.settle, outcome=write.outcome, blocks=self._blocks(session))
        return make(
            session.request_id,
            incarnation=session.incarnation,
            epoch=session.grant.epoch,
            offset=write.offset,
            token_ids=write.token_ids,
            text=write.text,
            logprobs=write.logprobs,
            cached=write.cached,
        )

    def _blocks(self, session: Session) -> list[bytes]:
        """What the planner is to learn of a prompt's content; nothing where it would not choose by it."""
        if self._context.settings.prefix_affinity != "auto" or not self._placement.is_l4:
            return []
        if not is_worth_telling(self._sessions.found_share, num_workers=self._fleet_view.num_workers):
            return []
        return block_keys(session.prompt_ids, most=MOST_TOLD)

    def _settled(self, session: Session, outcome: Outcome) -> None:
        context = self._context
        self._sessions.settle(session)
        runtime_s = asyncio.get_running_loop().time() - session.started_s
        view = session.view
        if outcome.state is RequestState.DONE:
            context.observer.request_succeeded(
                view, output_tokens=len(session.output_ids), runtime_s=runtime_s, text=session.text_preview
            )
        else:
            context.observer.request_failed(view, error=outcome.error, runtime_s=runtime_s)
