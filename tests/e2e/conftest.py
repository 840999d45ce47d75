"""One deployment with real vLLM for the whole folder: two of everything that may be doubled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from l4queue import Client, Settings
from l4queue.cli.stack.embedded import free_port
from l4queue.models import Plan, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from tests.protocol.server import DURABLE, RedisServer
from tests.services.processes import Processes, serve_by, until

MAX_MODEL_LEN = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What a test may use of it."""

    settings: Settings
    processes: Processes
    server: RedisServer
    model: Path
    flower_url: str
    metrics_ports: dict[int, int] = field(default_factory=dict)

    def client(self) -> Client:
        """A new client; close it."""
        return Client(settings=self.settings)

    def start_worker(self, number: int) -> int:
        """Start worker `number` on its own core; returns its process id."""
        self.metrics_ports[number] = port = free_port()
        core = str(number % (os.cpu_count() or 1))
        return self.processes.worker(f"worker-{number}", cpu_cores=core, metrics_port=port).pid

    def publish(self, *stages: StagePlan) -> None:
        """Publish a plan for the workers that are there; returns when they serve by it, or by a newer one."""
        with self.client() as client:
            overview = client.overview()
        version = overview.plan.version
        assert {i for stage in stages for i in stage.worker_ids} == {w.worker_id for w in overview.workers}
        plan = Plan(version=version + 1, stages=stages)
        body = plan_to_json(plan)
        calls = Calls(Keys(self.settings.namespace))
        executor = Executor(self.settings.redis_url)
        try:
            call = calls.publish(expected_version=version, version=version + 1, body=body)
            assert executor.run(call) is Verdict.OK
        finally:
            executor.close()
        with self.client() as client:
            until(lambda: serve_by(plan, client.overview()), "the workers follow the plan")

    def await_workers(self, number: int, *, timeout_s: float = 240.0) -> None:
        """Wait until so many workers serve."""
        with self.client() as client:
            until(lambda: len(client.overview().workers) == number, f"{number} workers", timeout_s=timeout_s)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small random-weight Llama, built once."""
    from workers.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def deployment(
    redis_executable: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Redis (strict), 2 dispatchers, 2 planners, 2 beats, 2 vLLM workers, Flower."""
    with deploy(redis_executable, tiny_model, tmp_path_factory.mktemp("deployment")) as started:
        for number in range(2):
            planner = ("worker", "-P", "solo", "-Q", "l4-control", "-n", f"planner-{number}@%h")
            started.processes.start(f"planner-{number}", "-m", "celery", "-A", "dispatcher.app", *planner)
            started.processes.start(f"beat-{number}", "-m", "celery", "-A", "dispatcher.app", "beat")
        started.processes.start("flower", "-m", "dispatcher.flower")
        started.await_workers(2)
        yield started


@contextmanager
def deploy(redis_executable: str, model: Path, folder: Path, **more: object) -> Iterator[Deployment]:
    """Redis (strict), 2 dispatchers and 2 vLLM workers that may still be starting; settings in `more`."""
    server = RedisServer(redis_executable, folder, DURABLE).start()
    values: dict[str, object] = {
        "redis_url": server.url,
        "model": str(model),
        "max_model_len": MAX_MODEL_LEN,
        "engine": "vllm",
        "dtype": "float32",
        "replan_interval_s": 2.0,
        "plan_min_life_s": 4.0,
        "flower_port": free_port(),
        **more,
    }
    processes = Processes(folder, **values)
    settings = Settings(**values)  # type: ignore[arg-type] # the same values, typed by pydantic
    deployment = Deployment(
        settings=settings,
        processes=processes,
        server=server,
        model=model,
        flower_url=f"http://127.0.0.1:{settings.flower_port}",
    )
    try:
        for number in range(2):
            deployment.start_worker(number)
            processes.start(f"dispatcher-{number}", "-m", "dispatcher")
        yield deployment
    finally:
        processes.close()
        server.kill()
