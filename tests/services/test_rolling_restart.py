"""An upgrade: each process of a deployment ends by SIGTERM and starts again, one after the other, under load."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from l4queue import AsyncClient, Settings
from l4queue.models import RequestState
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from tests.chaos.wishes import expected
from tests.conftest import SEED
from tests.protocol.server import RedisServer
from tests.services.processes import Processes
from tests.services.processes import until as until_seen

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

CELERY = ("-m", "celery", "-A", "dispatcher.app")
COMMANDS: dict[str, tuple[str, ...]] = {
    "w1": ("-m", "workers"),
    "w2": ("-m", "workers"),
    "d1": ("-m", "dispatcher"),
    "d2": ("-m", "dispatcher"),
    "planner": (*CELERY, "worker", "-P", "solo", "-Q", "l4-control", "-n", "planner@%h"),
    "beat": (*CELERY, "beat", "--pidfile="),
}
TWO_DISPATCHERS = "L4_TEST_TWO_DISPATCHERS" in os.environ  # to measure what a second one saves
CALM_S = float(os.environ.get("L4_TEST_CALM_S", "1"))
RATE_PER_S = 5.0


@dataclass
class Load:
    """A client that enqueues all the time and reads every stream; what each request took, and what was wrong."""

    client: AsyncClient
    took_s: list[tuple[float, float]] = field(default_factory=list)  # (when enqueued, until its end)
    wrong: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    async def run(self, stopping: asyncio.Event) -> None:
        """Until stopped; then until the last one has ended."""
        rng = random.Random(SEED)
        async with asyncio.TaskGroup() as group:
            while not stopping.is_set():
                length = rng.choices((rng.randint(10, 200), rng.randint(400, 1000)), weights=(9, 1))[0]
                group.create_task(self._one(f"{len(self.ids)}:".ljust(length, "x"), rng.randint(20, 200)))
                await asyncio.sleep(rng.expovariate(RATE_PER_S))

    async def _one(self, prompt: str, max_tokens: int) -> None:
        began_s = time.monotonic()
        ids = list(prompt.encode())
        handle = await self.client.enqueue(token_ids=ids, max_tokens=max_tokens, ignore_eos=True)
        self.ids.append(handle.id)
        got: list[int] = []
        async for chunk in handle.stream(timeout=120):
            got += chunk.token_ids
            if chunk.offset != len(got):
                self.wrong.append(f"{handle.id}: {len(got)} tokens at {chunk.offset}")
        if tuple(got) != expected(prompt, max_tokens):
            self.wrong.append(f"{handle.id}: {len(got)} tokens, not those of one run")
        self.took_s.append((began_s, time.monotonic() - began_s))

    def latencies_s(self, since_s: float, until_s: float) -> list[float]:
        """End to end, of those enqueued in that time, in order of length."""
        return sorted(took for began, took in self.took_s if since_s <= began < until_s)


class Deployment:
    """Workers, dispatchers, planner and beat as processes."""

    def __init__(self, folder: Path, url: str) -> None:
        settings = {"redis_url": url, "engine": "emulated", "model": "tiny", "lease_s": 2.0}
        self.settings = Settings(**settings, _env_file=None)  # type: ignore[arg-type,call-arg]
        self.processes = Processes(folder, replan_interval_s=1.0, plan_min_life_s=0.0, **settings)
        self.reads = Reads(Keys(self.settings.namespace))
        self.executor = Executor(url)
        self.names = [name for name in COMMANDS if name != "d2" or TWO_DISPATCHERS]

    def launch(self, name: str) -> Callable[[], object]:
        """Start one; what is true once it does its part."""
        before = len(self._decisions())
        more = {"worker_id": name} if name in ("w1", "w2") else {}
        pid = self.processes.start(name, *COMMANDS[name], **more).pid
        signs: dict[str, Callable[[], object]] = {
            "w": lambda: name in self._workers(),
            "d": lambda: f"-{pid} ready" in self.processes.log(name),
            "p": lambda: len(self._decisions()) > before,
            "b": lambda: len(self._decisions()) > before,
        }
        return signs[name[0]]

    def start(self, *names: str) -> None:
        """Start these at once and wait until each does its part."""
        signs = {name: self.launch(name) for name in names}
        for name, sign in signs.items():
            until_seen(sign, f"{name} is at work", timeout_s=120)

    def stop(self, name: str) -> int:
        """SIGTERM; the exit code."""
        return self.processes.stop(name, timeout_s=120)

    def close(self) -> None:
        """Kill what runs."""
        self.processes.close()
        self.executor.close()

    def _workers(self) -> set[str]:
        return {incarnation.rpartition(":")[0] for incarnation, _ in self.executor.run(self.reads.incarnations())}

    def _decisions(self) -> list[tuple[int, str]]:
        return self.executor.run(self.reads.decisions(count=2000))


@pytest.fixture
def deployment(durable_server: RedisServer, tmp_path: Path) -> Iterator[Deployment]:
    """Nothing runs yet but Redis, which fsyncs every write."""
    opened = Deployment(tmp_path, durable_server.url)
    yield opened
    opened.close()


async def test_each_process_is_restarted_under_load(deployment: Deployment) -> None:
    """Nothing is lost, every stream is whole, nobody is blamed, all end with 0."""
    await asyncio.to_thread(deployment.start, *deployment.names)
    stopping = asyncio.Event()
    async with AsyncClient(settings=deployment.settings) as client:
        load = Load(client)
        running = asyncio.create_task(load.run(stopping))
        marks = [("undisturbed", time.monotonic())]
        await asyncio.sleep(CALM_S)  # the load itself, for as long as is to be measured
        for name in deployment.names:
            marks.append((name, time.monotonic()))
            assert await asyncio.to_thread(deployment.stop, name) == 0
            await asyncio.to_thread(deployment.start, name)
        marks.append(("end", time.monotonic()))
        stopping.set()
        await running
        records = [await (await client.get(request_id)).status() for request_id in load.ids]
        overview = await client.overview()

    for (name, since_s), (_, until_s) in itertools.pairwise(marks):
        took = load.latencies_s(since_s, until_s) or [0.0]
        figures = [f"{value:.3f}" for value in (statistics.mean(took), statistics.median(took), took[-1])]
        print(f"{name:12} {until_s - since_s:5.1f} s {len(took):4} requests, mean, p50, max s: {figures}")
    assert load.wrong == []
    assert {record.state for record in records} == {RequestState.DONE}
    assert [record.request_id for record in records if record.crashes] == []
    assert len(load.took_s) == len(load.ids) > 40
    assert sum(record.was_resumed for record in records) > 0, "nothing ran on a worker that was restarted"
    assert overview.counts["live"] == 0
