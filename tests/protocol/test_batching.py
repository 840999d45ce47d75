"""Calls of one script that share an EVALSHA do what they do one by one, in the same order."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.errors import ServiceUnavailable
from l4queue.models import RequestState
from l4queue.protocol.batching import Commands
from l4queue.protocol.calls import Call, Calls, Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.records import Outcome
from tests.protocol.scene import Scene

_NUMBERS = itertools.count()
_IDS = ("a", "b", "c", "d")
_TIMES = re.compile(rb".*_ms$|^at$")


def _submit(calls: Calls, request_id: str, number: int) -> Call[Any]:
    return calls.submit(
        request_id,
        digest=str(number % 2),
        body="{}",
        kind="p",
        prompt=b"hello",
        charge_tokens=10 + number,
        max_live_tokens=40,
        max_live_bytes=10**8,
        deadline_ms=3_600_000 * (number % 2),
        ttl_ms=60_000,
        client_id="c1",
    )


def _route(calls: Calls, request_id: str, number: int) -> Call[Any]:
    return calls.route(
        request_id,
        entry_id="1-1",
        stage=str(number % 2),
        score=float(number),
        token_ids=[1, 2, 3],
        max_tokens=8,
        plan_version=0,
        bucket=number,
    )


def _emit(calls: Calls, request_id: str, number: int) -> Call[Any]:
    offset = number // 2
    ids = range(offset, offset + 1 + number % 2)
    return calls.emit(request_id, incarnation="w1", epoch=1, offset=offset, token_ids=ids, text="x" * len(ids))


def _settle(calls: Calls, request_id: str, number: int) -> Call[Any]:
    outcome = Outcome(state=RequestState.DONE, finish_reason="stop", held_text="end")
    ids = range(number, number + number % 3)
    return calls.settle(
        request_id, incarnation="w1", epoch=1, offset=number, token_ids=ids, text="y" * len(ids), outcome=outcome
    )


def _release(calls: Calls, request_id: str, number: int) -> Call[Any]:
    return calls.release(request_id, incarnation="w1", epoch=1, blame=number % 2 == 1)


def _cancel(calls: Calls, request_id: str, number: int) -> Call[Any]:
    return calls.cancel(request_id, reason="asked to", nonce=str(number))


_KINDS = {f.__name__: f for f in (_submit, _route, _emit, _settle, _release, _cancel)}
_STEPS = st.lists(  # neighbours of one kind are what is under test
    st.tuples(
        st.sampled_from(sorted(_KINDS)),
        st.lists(st.tuples(st.sampled_from(_IDS), st.integers(0, 4)), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=6,
)


def _without_times(value: Any) -> Any:
    """A dump without moments: fields and streams' ids that differ by the clock."""
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not (isinstance(k, bytes) and _TIMES.match(k))}
    return value


def _facts(scene: Scene) -> dict[str, Any]:
    found = {}
    for name, value in _without_times(scene.dump()).items():
        if name.startswith(("wake:", "ctl:", "finished", "mail:", "in", "deadlines", "foreground", "dead")):
            # streams by the clock; wake-ups are one for a batch
            found[name] = len(value) if name.startswith(("finished", "mail:", "in", "deadlines", "dead")) else True
        else:
            found[name] = value
    for name, value in found.items():
        if name.startswith("out:"):  # the end tells times of the record
            found[name] = [(entry, _without_times(fields)) for entry, fields in value]
        if name.startswith("req:"):
            value.pop(b"entry", None)
            value.pop(b"ledger", None)
            value.pop(b"charge_bytes", None)  # with the digits of moments
        if name == "counts":
            value.pop(b"live_bytes", None)
    return found


@given(steps=_STEPS)
def test_calls_that_share_a_script_do_as_they_do_alone(redis_server: Any, steps: list[Any]) -> None:
    """Replies and all that is stored are equal, for any mixture of transitions, possible or not."""
    executor = Executor(redis_server.url)
    number = next(_NUMBERS)
    alone, together = (Scene(executor, f"{name}{number}") for name in ("alone", "together"))
    try:
        for scene in (alone, together):
            scene.queue_up("a", "b")
            scene.register()
            scene.take()
        replies: dict[Scene, list[Any]] = {}
        for scene in (alone, together):
            calls = [_KINDS[kind](scene.calls, i, n) for kind, items in steps for i, n in items]
            replies[scene] = (
                executor.run_many(calls) if scene is together else [executor.run(call) for call in calls]
            )
        told = [
            [(r.verdict, getattr(r, "request_id", None)) if hasattr(r, "verdict") else r for r in replies[scene]]
            for scene in (alone, together)
        ]
        assert told[0] == told[1]
        assert _facts(alone) == _facts(together)
    finally:
        alone.close()
        together.close()
        executor.close()


@given(
    sizes=st.lists(st.tuples(st.sampled_from(["emit", "settle", None]), st.integers(0, 70_000)), max_size=80),
)
def test_commands_have_every_call_once_in_order(sizes: list[tuple[str | None, int]]) -> None:
    """No EVALSHA is long or large, but for a call that is large by itself; replies come back one for each call."""
    calls: list[Call[Any]] = [
        Call(name, ("{l4}:k",) if name else (), (str(i), "x" * size), str) for i, (name, size) in enumerate(sizes)
    ]
    commands = Commands.of(calls)
    seen = []
    found: list[Any] = []
    for words in commands.words:
        if words[0] != "EVALSHA":
            group = [words[0]]
        else:
            num_keys = int(words[2])
            rest = words[3 + num_keys : -1]
            group = list(rest[::2])
            assert num_keys == len(group) <= 32
            assert len(group) == 1 or sum(len(str(part)) for part in rest) <= 65_536
            assert (words[-1] == "") == (len(group) == 1)
        seen += group
        found.append([f"reply to {i}" for i in group] if len(group) > 1 else f"reply to {group[0]}")
    assert seen == [str(i) for i in range(len(calls))]
    assert commands.replies(found) == [f"reply to {i}" for i in range(len(calls))]


def test_an_error_of_a_command_is_that_of_each_of_its_calls() -> None:
    """So NOSCRIPT sends all of them again."""
    keys = Calls(Keys("t"))
    calls = [keys.extend("w", lease_ms=1), keys.extend("v", lease_ms=1), keys.retire("w")]
    error = ValueError("no")
    assert Commands.of(calls).replies([error, b"OK"]) == [error, error, b"OK"]


def test_nothing_is_no_command() -> None:
    """An empty list of calls is sent by nobody."""
    assert Commands.of([]).words == []


def test_a_call_that_fails_leaves_its_neighbours_and_their_counts(scene: Scene) -> None:
    """A script error of one is raised after all have run; what the others count is counted."""
    broken = Call("emit", (scene.keys.request("a"), scene.keys.output("a")), (), str)  # without arguments
    good = [_submit(scene.calls, name, 0) for name in ("a", "b")]
    wrong = Call("submit", good[0].keys, (), str)

    with pytest.raises(ServiceUnavailable):
        scene.executor.run_many([good[0], wrong, good[1], broken])

    assert scene.counts()["live"] == scene.counts()["submitted"] == 2
    assert scene.counts()["live_tokens"] == 20


def test_bounds_count_what_the_batch_has_let_in(scene: Scene) -> None:
    """Of four that are sent together no more are accepted than one by one."""
    replies = scene.executor.run_many([_submit(scene.calls, name, 2) for name in _IDS])
    assert [reply.verdict for reply in replies] == [Verdict.OK] * 3 + [Verdict.FULL]
