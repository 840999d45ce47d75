"""Sessions of a worker: their marks, their counters and the wake-up of the intake."""

from __future__ import annotations

import asyncio
import json

import pytest

from l4queue.protocol.calls import MoveKind
from l4queue.protocol.records import CachedPrompt, Grant, pack_ids
from workers.engine.base import EngineOutput
from workers.loop.session import Session
from workers.loop.sessions import Sessions
from workers.loop.text import no_text


def _session(request_id: str, *, prompt_tokens: int = 3) -> Session:
    grant = Grant(
        request_id=request_id,
        epoch=1,
        body=json.dumps({"params": {"max_tokens": 10}}).encode(),
        packed_ids=pack_ids([5] * prompt_tokens),
        offset=0,
        prompt_tokens=prompt_tokens,
        crashes=0,
        score=0.0,
        submitted_ms=0,
        deadline_ms=None,
        stage="0",
    )
    return Session(grant, incarnation="w:1", stage=0, range_text="0–∞", started_s=0.0, make_text=no_text)


def _token(session: Session) -> EngineOutput:
    return EngineOutput(request_id=session.engine_id, token_ids=(7,))


def test_a_session_is_found_until_it_is_dropped() -> None:
    sessions, session = Sessions(), _session("a")
    sessions.add(session, watch_tokens=8)
    assert (len(sessions), sessions.get("a:1"), sessions.ids()) == (1, session, frozenset({"a:1"}))
    assert "a:1" in sessions
    assert session.watch_tokens == 8
    assert [sessions.drop(session), sessions.drop(session)] == [True, False]
    assert (list(sessions), sessions.num_finished) == ([], 0)


def test_it_may_be_dropped_while_all_are_looked_at() -> None:
    sessions = Sessions()
    for name in "abc":
        sessions.add(_session(name), watch_tokens=None)
    assert all(sessions.drop(session) for session in sessions)
    assert not sessions


@pytest.mark.parametrize(
    ("kind", "num_handed_over"),
    [(MoveKind.HANDOVER, 1), (MoveKind.ESCAPE, 1), (MoveKind.STEAL, 0), (None, 0)],
)
def test_one_that_leaves_moves_nowhere_else(kind: MoveKind | None, num_handed_over: int) -> None:
    sessions, session = Sessions(), _session("a")
    sessions.add(session, watch_tokens=None)
    session.feed(_token(session))
    assert session.may_move
    sessions.begin_move(session, kind)
    assert (session.is_moving, session.may_move) == (True, False)
    assert sessions.num_handed_over == num_handed_over
    sessions.end_move(session)
    assert session.may_move


def test_a_new_plan_moves_the_watch_of_all() -> None:
    sessions, pair = Sessions(), [_session("a"), _session("b")]
    for session in pair:
        sessions.add(session, watch_tokens=8)
    sessions.watch(pair[0], from_tokens=99)
    assert [session.watch_tokens for session in pair] == [99, 8]
    sessions.watch_all(from_tokens=None)
    assert [session.watch_tokens for session in pair] == [None, None]


def test_prompts_without_a_token_are_pending() -> None:
    sessions, pair = Sessions(), [_session("a", prompt_tokens=4), _session("b", prompt_tokens=6)]
    for session in pair:
        sessions.add(session, watch_tokens=None)
    pair[0].feed(_token(pair[0]))
    assert (sessions.prefills, sessions.pending_prefill_tokens) == ([6], 6)


async def test_a_settled_one_is_counted_and_wakes_the_intake() -> None:
    sessions, session = Sessions(), _session("a")
    sessions.add(session, watch_tokens=None)
    sessions.begin_round()
    waiting = asyncio.create_task(sessions.woken())
    sessions.settle(session)
    await waiting
    assert (len(sessions), sessions.num_finished) == (0, 1)


def test_hits_of_long_ago_fade() -> None:
    """The latest thousand requests or so say how much is found now; the counters have all."""
    sessions, session = Sessions(), _session("a", prompt_tokens=100)
    assert sessions.found_share == 0.0
    for number in range(20_000):
        sessions.count_cached(session, CachedPrompt(found_tokens=90 if number < 10_000 else 0))
        assert number >= 10_000 or sessions.found_share == pytest.approx(0.9)
    assert (sessions.num_prompt_tokens, sessions.num_cached_tokens) == (2_000_000, 900_000)
    assert 0.0 < sessions.found_share < 0.001
