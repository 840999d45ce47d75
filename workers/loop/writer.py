"""Writes of generated tokens: one round trip for all requests, every verdict of the fence obeyed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from l4queue.models import RequestState
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.records import Grant, Outcome
from workers.engine.loop_work import lease_of
from workers.loop.session import Session, Write
from workers.loop.state import WorkerState

__all__ = ("Writer",)

log = logging.getLogger("l4queue.worker")


class Writer:
    """Turns writes of sessions into calls and their verdicts into consequences."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._in_order = asyncio.Lock()

    async def flush(self, sessions: Sequence[Session]) -> None:
        """Write all that these sessions have pending, and settle those that have ended.

        One at a time: two writes of one request on two connections could arrive in the wrong order.
        """
        async with self._in_order:
            await self._flush(sessions)

    async def _flush(self, sessions: Sequence[Session]) -> None:
        writes = [write for session in sessions if (write := session.take_write()) is not None]
        if not writes:
            return
        stopped = [w.session for w in writes if w.session.ended_by_text]
        if stopped:  # the engine knows nothing of stop strings and would go on
            await self._state.abort(stopped)
        verdicts = await self._state.executor.run_many([self._call(write) for write in writes])
        lost = []
        for write, verdict in zip(writes, verdicts, strict=True):
            if verdict in (Verdict.OK, Verdict.DUP):
                if write.outcome is not None:
                    self._settled(write.session, write.outcome)
            else:
                if verdict is not Verdict.FENCED:
                    log.error("output of %s out of step: %s", write.session.request_id, verdict)
                lost.append(write.session)
        await self._state.drop(lost)

    async def give_back(
        self, sessions: Sequence[Session], *, why: str, blame: bool = False, culprit: str | None = None
    ) -> None:
        """Return these running requests with their progress: with blame after a crash of the engine.

        `culprit` is the id in the engine of one that gets it all the same.
        """
        state = self._state
        if culprit is not None and culprit not in state.sessions:  # it had not begun
            await state.executor.run(self._blame(culprit))
        if not sessions:
            return
        await state.abort(sessions)
        await self.flush(sessions)
        left = [session for session in sessions if session.engine_id in state.sessions]
        calls = [
            state.calls.release(
                session.request_id,
                incarnation=session.incarnation,
                epoch=session.grant.epoch,
                blame=blame or session.engine_id == culprit,
                max_crashes=state.settings.max_crashes,
            )
            for session in left
        ]
        await state.executor.run_many(calls)
        for session in left:
            if state.sessions.pop(session.engine_id, None) is not None:
                state.observer.request_moved(state.view(session), why=why)
        log.info("gave back %d requests: %s", len(left), why)

    async def refuse(self, grant: Grant, outcome: Outcome) -> None:
        """Settle a request that cannot even start."""
        state = self._state
        call = state.calls.settle(
            grant.request_id,
            incarnation=state.lease.incarnation,
            epoch=grant.epoch,
            offset=grant.offset,
            token_ids=(),
            text="",
            outcome=outcome,
        )
        await state.executor.run(call)

    def _blame(self, engine_id: str) -> Call[Verdict]:
        state, (request_id, epoch) = self._state, lease_of(engine_id)
        return state.calls.release(
            request_id,
            incarnation=state.lease.incarnation,
            epoch=epoch,
            blame=True,
            max_crashes=state.settings.max_crashes,
        )

    def _call(self, write: Write) -> Call[Verdict]:
        calls, session = self._state.calls, write.session
        make: Callable[..., Call[Verdict]] = calls.emit
        if write.outcome is not None:
            make = partial(calls.settle, outcome=write.outcome)
        return make(
            session.request_id,
            incarnation=session.incarnation,
            epoch=session.grant.epoch,
            offset=write.offset,
            token_ids=write.token_ids,
            text=write.text,
            logprobs=write.logprobs,
        )

    def _settled(self, session: Session, outcome: Outcome) -> None:
        state = self._state
        state.sessions.pop(session.engine_id, None)
        state.num_finished += 1
        state.nudge.set()
        runtime_s = asyncio.get_running_loop().time() - session.started_s
        view = state.view(session)
        if outcome.state is RequestState.DONE:
            state.observer.request_succeeded(
                view, output_tokens=len(session.output_ids), runtime_s=runtime_s, text=session.text_preview
            )
        else:
            state.observer.request_failed(view, error=outcome.error, runtime_s=runtime_s)
