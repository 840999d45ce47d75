"""Requests move between real vLLM engines while they run, and nobody who reads their text can tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from l4queue.models import StagePlan
from tests.e2e.conftest import Deployment, deploy
from tests.services.processes import until

pytestmark = [pytest.mark.vllm, pytest.mark.services, pytest.mark.timeout(600)]
GROWING = {"max_tokens": 400, "temperature": 0.0, "ignore_eos": True}
CROWD = 12


@pytest.fixture(scope="module")
def moving(
    redis_executable: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Two workers without a planner: the test publishes the plans. Only hand-over moves what runs."""
    folder = tmp_path_factory.mktemp("moving")
    with deploy(redis_executable, tiny_model, folder, steal_from="none", max_running=32) as started:
        started.await_workers(2)
        yield started


def test_a_long_conversation_grows_through_the_stages_and_reads_as_if_uncut(moving: Deployment) -> None:
    """Its stage is crowded, the next one calm: it is handed over; ids and text are those of an uncut run."""
    with moving.client() as client:
        uncut = client.enqueue("Once upon a time", **GROWING).result(timeout=120)
        assert not uncut.resumed
        moving.publish(
            StagePlan(low_tokens=0, high_tokens=64, num_workers=1, worker_ids=("worker-0",)),
            StagePlan(low_tokens=64, high_tokens=None, num_workers=1, worker_ids=("worker-1",)),
        )
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
            timeout_s=60,
        )
        handle = client.enqueue("Once upon a time", **GROWING)
        chunks = list(handle.stream(timeout=240))
        ended.set()
        for thread in threads:
            thread.join(120)

        result = handle.result(timeout=10)
        assert result.token_ids == uncut.token_ids
        assert result.text == uncut.text == "".join(chunk.text for chunk in chunks)
        story = [event.what for event in handle.explain()]
        assert story[:4] == ["accepted", "routed", "taken", "first token"]
        assert story[4:7] == ["hand-over", "taken", "resumed"], story
        assert story[-1] == "done"
        assert handle.status().worker == "worker-1"
