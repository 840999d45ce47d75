"""Several workers in one process: they begin and end together, and speak for themselves."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import JsonValue

from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.failure import EXIT_CONFIG
from workers.engine.base import EngineDied
from workers.telemetry.observer import NullObserver, RequestView
from workers.worker_group import WorkerGroup, main, make_worker_group


class Plain:
    """A worker with one request that runs until it is told to stop, or fails when told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = asyncio.Event()
        self.is_drained = False
        self.cancelled: list[str] = []
        self._end = asyncio.Event()
        self._failure: Exception | None = None

    async def run(self) -> None:
        self.started.set()
        await self._end.wait()
        if self._failure is not None:
            raise self._failure
        self.is_drained = True

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._end.set()

    def request_stop(self) -> None:
        self._end.set()

    def request_cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def stats(self) -> dict[str, JsonValue]:
        return {"worker": self.name, "engine": "emulated 1", "running": 2, "finished": 5}

    def active(self) -> list[RequestView]:
        one = RequestView(
            request_id=f"{self.name}-r",
            stage=0,
            range_text="0–∞",
            prompt_tokens=1,
            max_tokens=1,
            num_resumed=0,
            epoch=1,
            submitted_ms=0,
        )
        return [one]


async def test_a_stop_drains_every_worker() -> None:
    workers = [Plain("a"), Plain("b"), Plain("c")]
    group = WorkerGroup(workers)
    running = asyncio.create_task(group.run())
    await asyncio.gather(*(worker.started.wait() for worker in workers))
    group.request_stop()
    await running
    assert all(worker.is_drained for worker in workers)


async def test_one_that_fails_ends_all_after_the_others_have_drained() -> None:
    workers = [Plain("a"), Plain("b")]
    running = asyncio.create_task(WorkerGroup(workers).run())
    await asyncio.gather(*(worker.started.wait() for worker in workers))
    workers[1].fail(EngineDied("gone"))
    with pytest.raises(EngineDied, match="gone"):
        await running
    assert workers[0].is_drained


async def test_figures_are_added_up_and_kept_apart() -> None:
    workers = [Plain("a"), Plain("b")]
    group = WorkerGroup(workers)
    stats = group.stats()
    assert (stats["running"], stats["finished"], stats["engine"]) == (4, 10, "emulated 1")
    assert stats["workers"] == {"a": workers[0].stats(), "b": workers[1].stats()}
    assert [view.request_id for view in group.active()] == ["a-r", "b-r"]
    group.request_cancel("r")
    assert [worker.cancelled for worker in workers] == [["r"], []], "one worker cancels wherever it runs"


def test_only_emulated_engines_share_a_process() -> None:
    with pytest.raises(ConfigError, match="one process holds one engine"):
        make_worker_group(Settings(engine="vllm"), NullObserver(), worker_ids=["a", "b"])


@pytest.mark.parametrize("worker_ids", [[], ["a", "a"]])
def test_workers_without_a_name_of_their_own_are_refused(
    worker_ids: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("workers.__main__.guard_descendants", lambda: None)  # it would guard the tests' own group
    assert main(worker_ids) == EXIT_CONFIG
    assert "each once" in capsys.readouterr().err
