"""Requests move between real vLLM engines while they run, and nobody who reads their text can tell."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from threading import Event, Thread
from typing import Any

import pytest

from l4queue import Client, Handle, Result
from l4queue.errors import RequestFailed
from l4queue.models import TERMINAL, RequestState, StagePlan
from tests.e2e.conftest import Deployment, deploy
from tests.services.processes import until
from workers.app import make_app, node_name
from workers.kv.store import default_directory

pytestmark = [pytest.mark.vllm, pytest.mark.services, pytest.mark.timeout(600)]
GROWING = {"max_tokens": 400, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}
STORY = "Once upon a time"
PROMPTS = [STORY, *(f"Chapter {number} of a story that" for number in range(20))]
CROWD = 12
ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """A deployment whose short requests are worker 0's, and what uncut runs gave."""

    deployment: Deployment
    uncut: dict[str, Result]
    directory: Path

    def engine(self, number: int) -> dict[str, Any]:
        """What a worker tells of its engine."""
        name = node_name(f"worker-{number}")
        app = make_app(self.deployment.settings)
        return until(lambda: (app.control.inspect([name], timeout=2.0).stats() or {}).get(name), name)

    def grow(self, client: Client) -> list[Handle]:
        """Requests that all outgrow the first stage; together they crowd it."""
        return client.enqueue_many(PROMPTS[1:], **GROWING)

    def check(self, handles: list[Handle]) -> None:
        """All end as if never cut."""
        for prompt, handle in zip(PROMPTS[1:], handles, strict=True):
            result = handle.result(timeout=120)
            assert result.token_ids == self.uncut[prompt].token_ids
            assert result.text == self.uncut[prompt].text
            check_logprobs(result, self.uncut[prompt])


def check_logprobs(result: Result, uncut: Result) -> None:
    """One for each token, in order, and as those of an uncut run but for the rounding of another batch."""
    assert result.logprobs is not None
    assert uncut.logprobs is not None
    assert [row.token_id for row in result.logprobs] == list(result.token_ids)
    for row, other in zip(result.logprobs, uncut.logprobs, strict=True):
        assert len(row.top) == 1
        assert row.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.fixture(scope="module")
def moving(redis_executable: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    """Two workers without a planner: the test publishes the plans. Only hand-over moves what runs."""
    folder, namespace = tmp_path_factory.mktemp("moving"), f"moving-{uuid.uuid4().hex[:8]}"
    options = {"steal_from": "none", "max_running": 32, "lease_s": 20.0, "namespace": namespace}
    with deploy(redis_executable, tiny_model, folder, **options) as started:
        started.await_workers(2)
        with started.client() as client:
            uncut = [handle.result(timeout=240) for handle in client.enqueue_many(PROMPTS, **GROWING)]
        assert not any(result.resumed for result in uncut)
        started.publish(
            StagePlan(low_tokens=0, high_tokens=64, num_workers=1, worker_ids=("worker-0",)),
            StagePlan(low_tokens=64, high_tokens=None, num_workers=1, worker_ids=("worker-1",)),
        )
        yield Moving(
            deployment=started,
            uncut=dict(zip(PROMPTS, uncut, strict=True)),
            directory=default_directory(namespace),
        )
    rmtree(default_directory(namespace), ignore_errors=True)  # workers that had to be killed leave it


def test_a_long_conversation_grows_through_the_stages_and_reads_as_if_uncut(moving: Moving) -> None:
    """Its stage is crowded, the next one calm: it goes there with its KV; ids and text are the uncut run's."""
    with moving.deployment.client() as client:
        ended = Event()

        def crowd() -> None:
            """Keeps one more short request in the first stage."""
            while not ended.is_set():
                client.enqueue("x", max_tokens=40, temperature=0.0, ignore_eos=True).result(timeout=120)

        threads = [Thread(target=crowd, daemon=True) for _ in range(CROWD)]
        for thread in threads:
            thread.start()
        until(
            lambda: any(
                w.worker_id == "worker-0" and w.num_running >= CROWD // 2 for w in client.overview().workers
            ),
            "a crowd in the first stage",
            timeout_s=120,
        )
        handle = client.enqueue(STORY, **GROWING)
        chunks = list(handle.stream(timeout=240))
        ended.set()
        for thread in threads:
            thread.join(120)

        result, uncut = handle.result(timeout=120), moving.uncut[STORY]
        assert result.token_ids == uncut.token_ids
        assert result.text == uncut.text == "".join(chunk.text for chunk in chunks)
        check_logprobs(result, uncut)
        assert tuple(row for chunk in chunks for row in chunk.logprobs or ()) == result.logprobs
        events = handle.explain()
        story = [event.what for event in events]
        assert story[:4] == ["accepted", "routed", "taken", "first token"]
        assert story[4:7] == ["hand-over", "taken", "resumed"], story
        assert story[-1] == "done"
        assert "with its KV cache" in events[4].text
        assert handle.status().worker == "worker-1"
    engine = moving.engine(1)
    assert engine["kv_loads"] >= 1
    assert engine["kv_misses"] == 0


def test_a_constraint_is_kept_and_a_bad_one_is_a_failed_request(moving: Moving) -> None:
    """Pinned: nothing is shown before the end. Who asks for what cannot be is told why; the next one is served."""
    with moving.deployment.client() as client:
        bad = client.enqueue(STORY, max_tokens=8, structured_outputs={"regex": "[a-z"})
        with pytest.raises(RequestFailed, match="unclosed"):
            bad.result(timeout=120)
        choices = {"choice": ["red", "green", "blue"]}
        handles = [client.enqueue(STORY, seed=seed, structured_outputs=choices) for seed in range(6)]
        for handle in handles:
            chunks = list(handle.stream(timeout=120))
            assert len(chunks) == 1
            assert chunks[0].text in choices["choice"]
            assert handle.result(timeout=120).finish_reason == "stop"


def moved_or_ended(client: Client, handles: list[Handle], handovers: int) -> list[RequestState]:
    """The requests' states once there are more hand-overs than before or all have ended; until then, none."""
    has_moved = client.overview().counts["handovers"] > handovers
    states = [handle.status().state for handle in handles]
    return states if has_moved or TERMINAL.issuperset(states) else []


def grow_until_one_moves(moving: Moving, client: Client) -> list[Handle]:
    """Requests of which one at least has moved to worker 1, which is stopped. Whether a move pays is measured
    while they run: where none did and all have ended, worker 1 goes on for a while and others grow.
    """
    for _ in range(ATTEMPTS):
        before = client.overview().counts["handovers"]
        moving.deployment.processes.send("worker-1", signal.SIGSTOP)
        handles = moving.grow(client)
        states = until(partial(moved_or_ended, client, handles, before), "a move, or the end of all")
        if not TERMINAL.issuperset(states):
            return handles
        moving.deployment.processes.send("worker-1", signal.SIGCONT)
        moving.check(handles)
        moving.deployment.await_workers(2)
    raise AssertionError(f"no hand-over in {ATTEMPTS} attempts")


def test_damaged_segments_and_a_source_killed_amid_its_moves_change_nothing(moving: Moving) -> None:
    """The last test. The target is stopped while requests wait for it: one bit of each segment changes, worker 0
    dies. What is damaged or was never sent is computed again; with worker 1 the last KV leaves shared memory.
    """
    processes = moving.deployment.processes
    misses = moving.engine(1)["kv_misses"]
    with moving.deployment.client() as client:
        try:
            handles = grow_until_one_moves(moving, client)
            for path in moving.directory.glob("*.kv"):
                data = bytearray(path.read_bytes())
                data[len(data) * 3 // 4] ^= 1
                path.write_bytes(data)
            processes.stop("worker-0", signal.SIGKILL)
        finally:
            processes.send("worker-1", signal.SIGCONT)
        moving.deployment.await_workers(1)
        moving.deployment.publish(
            StagePlan(low_tokens=0, high_tokens=None, num_workers=1, worker_ids=("worker-1",))
        )
        moving.check(handles)
        assert moving.engine(1)["kv_misses"] > misses
    processes.stop("worker-1", timeout_s=120)
    assert not moving.directory.exists()
