"""Several workers in one process: `python -m workers.worker_group ID...`, for many emulated engines on few cores.

Each is a whole worker: its own id, lease, incarnation, engine and connections; nothing is decided for two of
them together. They share an event loop and one Celery node.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from pydantic import JsonValue

from l4queue.config import Settings, load_settings
from l4queue.errors import ConfigError
from l4queue.logs import take_log_format
from workers.__main__ import launch, serve
from workers.build import make_worker
from workers.host.bootsteps import WorkerLike
from workers.telemetry.observer import Observer, RequestView
from workers.telemetry.snapshot import WorkerSnapshot

__all__ = ("WorkerGroup", "main", "make_worker_group")

_SUMMED = ("running", "max_running", "context_tokens", "finished", "stolen", "handed_over")


class WorkerGroup:
    """Workers that begin and end together: the first that fails ends all, in good order."""

    def __init__(self, workers: Sequence[WorkerLike]) -> None:
        self._workers = tuple(workers)

    async def run(self) -> None:
        """Run all until stopped. Raises what the first that failed has raised, once the others have drained."""
        tasks = [asyncio.create_task(worker.run()) for worker in self._workers]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        self.request_stop()
        await asyncio.wait(tasks)
        for task in tasks:
            task.result()

    def request_stop(self) -> None:
        """End `run` soon, as each worker does."""
        for worker in self._workers:
            worker.request_stop()

    def request_cancel(self, request_id: str) -> None:
        """Cancel a request wherever it is: one worker sees to it."""
        self._workers[0].request_cancel(request_id)

    def stats(self) -> dict[str, JsonValue]:
        """Sums over the workers, and the stats of each by its id."""
        each = [worker.stats() for worker in self._workers]
        sums: dict[str, JsonValue] = {name: sum(_number(one.get(name)) for one in each) for name in _SUMMED}
        return {**sums, "engine": each[0].get("engine"), "workers": {str(one.get("worker")): one for one in each}}

    def snapshots(self) -> list[WorkerSnapshot]:
        """Of each worker."""
        return [snapshot for worker in self._workers for snapshot in worker.snapshots()]

    def active(self) -> list[RequestView]:
        """The requests running in any of them."""
        return [view for worker in self._workers for view in worker.active()]


def make_worker_group(settings: Settings, observer: Observer, *, worker_ids: Sequence[str]) -> WorkerGroup:
    """One emulated worker for each id; ConfigError for another engine, which needs a process of its own."""
    if settings.engine != "emulated":
        raise ConfigError(f"engine {settings.engine}: one process holds one engine, unless it is emulated")
    return WorkerGroup(
        [make_worker(settings.model_copy(update={"worker_id": name}), observer) for name in worker_ids]
    )


def main(worker_ids: Sequence[str]) -> int:
    """Entry point; `L4_WORKER_ID` names the Celery node."""
    return launch(lambda: _serve(worker_ids))


def _serve(worker_ids: Sequence[str]) -> int:
    if not worker_ids or len(set(worker_ids)) < len(worker_ids):
        raise ConfigError("name the workers of this process, each once: python -m workers.worker_group ID...")
    return serve(load_settings(), make=lambda s, observer: make_worker_group(s, observer, worker_ids=worker_ids))


def _number(value: JsonValue) -> float:
    return value if isinstance(value, int | float) else 0


if __name__ == "__main__":
    sys.exit(main(take_log_format(sys.argv[1:])))
