"""A GPU worker as a Celery worker: real processes, a real broker, the emulated engine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kombu.pools
import psutil
import pytest
import redis

from l4queue.config import load_settings
from l4queue.failure import EXIT_CONFIG
from l4queue.models import RequestState
from l4queue.observe.task_view import task_name
from l4queue.protocol.executor import Executor
from tests.protocol.scene import Scene
from tests.protocol.server import RedisServer
from tests.services.processes import Processes, until
from workers.app import make_app, node_name

if TYPE_CHECKING:
    from celery import Celery

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

ODD_WORKERS = str(Path(__file__).parent / "odd_workers.py")


class Deployment:
    """Two Redis servers (queue and broker), verbs to enqueue, and Celery's remote control."""

    def __init__(self, redis_executable: str, folder: Path) -> None:
        for name in ("queue", "broker"):
            (folder / name).mkdir()
        self.queue = RedisServer(redis_executable, folder / "queue").start()
        self.broker = RedisServer(redis_executable, folder / "broker").start()
        self.settings = load_settings(
            redis_url=self.queue.url,
            celery_broker_url=self.broker.url,
            engine="emulated",
            drain_s=5.0,
            max_running=4,
            lease_s=5.0,
        )
        self.processes = Processes(
            folder,
            redis_url=self.queue.url,
            celery_broker_url=self.broker.url,
            engine="emulated",
            drain_s=5.0,
            max_running=4,
            lease_s=5.0,
        )
        self.executor = Executor(self.queue.url)
        self.scene = Scene(self.executor, self.settings.namespace)
        self.app: Celery = make_app(self.settings)

    def enqueue(self, *request_ids: str, max_tokens: int) -> None:
        """Submit and route, as client and dispatcher would."""
        for request_id in request_ids:
            body = f'{{"params": {{"max_tokens": {max_tokens}}}}}'
            self.scene.submit(request_id, body=body, max_live_tokens=1_000_000)
            self.scene.route(request_id, max_tokens=max_tokens)

    def is_in(self, state: RequestState, *request_ids: str) -> Callable[[], bool]:
        """Whether all of them are in this state, to be polled."""
        return lambda: all(self.scene.state(request_id) is state for request_id in request_ids)

    def inspect(self, method: str, worker: str = "w1", **arguments: Any) -> Any:
        """What a worker answers to `celery inspect`, or None."""
        replies = getattr(self.app.control.inspect([node_name(worker)], timeout=1.0), method)(**arguments)
        return (replies or {}).get(node_name(worker))

    def is_serving(self, worker: str = "w1") -> bool:
        """Whether its engine is up and Celery hears it."""
        return "max_running" in (self.inspect("stats", worker) or {})

    @contextlib.contextmanager
    def watched(self, event_type: str) -> Iterator[Callable[[], list[str]]]:
        """A function that gives the ids of the requests for which this event has come so far."""
        seen: list[str] = []
        with self.app.connection_for_read() as connection:
            handlers = {event_type: lambda event: seen.append(event["uuid"])}
            receiver = self.app.events.Receiver(connection, handlers=handlers)
            consumers = receiver.get_consumers(connection.Consumer, connection.default_channel)

            def drain() -> list[str]:
                with contextlib.suppress(TimeoutError):
                    connection.drain_events(timeout=0.2)
                return seen

            with consumers[0]:
                drain()
                yield drain

    def close(self) -> None:
        """Leave nothing behind."""
        self.processes.close()
        self.app.close()
        self.scene.close()
        self.executor.close()
        self.queue.kill()
        self.broker.kill()


@pytest.fixture
def deployment(redis_executable: str, tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(redis_executable, tmp_path)
    yield deployment
    deployment.close()


def test_inspection_answers_with_the_engine_and_the_requests_that_run_in_it(deployment: Deployment) -> None:
    """Stats carry stage, range and load; `active` and `query_task` speak of requests, not of Celery tasks."""
    deployment.processes.worker("w1")
    deployment.enqueue("a", "b", max_tokens=8000)

    until(deployment.is_in(RequestState.RUNNING, "a", "b"), "both run")
    until(deployment.is_serving, "it answers")
    stats, active = deployment.inspect("stats"), deployment.inspect("active")
    known = deployment.app.control.inspect(timeout=1.0).query_task("a")

    assert stats["worker"] == "w1"
    assert stats["stage"] == 0
    assert stats["range_tokens"] == "0–∞"
    assert stats["running"] == 2
    assert stats["pool"]["implementation"].endswith("solo:TaskPool")
    assert {item["id"] for item in active} == {"a", "b"}
    assert {item["name"] for item in active} == {task_name(deployment.settings)}
    assert active[0]["kwargs"]["max_tokens"] == 8000
    assert known is not None
    assert list(known[node_name("w1")]) == ["a"]


def test_a_lost_broker_is_not_felt_by_the_engine(deployment: Deployment) -> None:
    """Cut connections, then kill and restart the broker: same process, same lease, every request done."""
    worker = deployment.processes.worker("w1")
    until(deployment.is_serving, "it serves")
    incarnations = deployment.executor.run(deployment.scene.reads.incarnations())

    deployment.enqueue("a", "b", max_tokens=300)
    until(deployment.is_in(RequestState.RUNNING, "a", "b"), "both run")
    with redis.Redis(port=deployment.broker.port) as broker:
        broker.client_kill_filter(_type="normal")
        broker.client_kill_filter(_type="pubsub")
    deployment.broker.kill()
    until(deployment.is_in(RequestState.DONE, "a", "b"), "both are done without a broker")
    deployment.enqueue("c", max_tokens=20)
    until(deployment.is_in(RequestState.DONE, "c"), "a new one is served without a broker")
    deployment.broker.start()
    kombu.pools.reset()  # our own connections to it are dead, too
    deployment.app = make_app(deployment.settings)

    stats = until(lambda: deployment.inspect("stats"), "it answers again", timeout_s=120)
    assert stats["finished"] == 3
    assert stats["pid"] == worker.pid
    after = deployment.executor.run(deployment.scene.reads.incarnations())
    assert [name for name, _ in after] == [name for name, _ in incarnations]
    assert deployment.scene.record("c").epoch == 1
    assert "Connection to broker lost" in deployment.processes.log("w1")


@pytest.mark.parametrize("terminate", [False, True])
def test_a_revoked_request_is_cancelled_waiting_or_running(deployment: Deployment, *, terminate: bool) -> None:
    """Also by a list of ids, twice, and when nobody knows the id; others go on."""
    running = ["a", "b", "c", "d"]
    deployment.processes.worker("w1")
    deployment.enqueue(*running, max_tokens=8000)
    until(deployment.is_in(RequestState.RUNNING, *running), "the engine is full")
    until(deployment.is_serving, "Celery hears what is sent once")
    deployment.enqueue("waits", max_tokens=10)

    with deployment.watched("task-revoked") as revoked:
        for _ in range(2):
            deployment.app.control.revoke(["a", "waits", "unknown"], terminate=terminate)
        deployment.app.control.terminate("b")

        until(deployment.is_in(RequestState.CANCELLED, "a", "b", "waits"), "three are cancelled")
        until(lambda: {item["id"] for item in deployment.inspect("active") or ()} == {"c", "d"}, "two go on")
        until(lambda: sorted(revoked()) == ["a", "b", "waits"], "Flower hears of each once")
    assert deployment.scene.record("a").error == "revoked"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "remote"])
def test_a_warm_shutdown_gives_requests_back_without_blame(deployment: Deployment, how: str) -> None:
    """They wait in the queue with what was generated; the process ends well and in time."""
    process = deployment.processes.worker("w1")
    deployment.enqueue("a", "b", max_tokens=8000)
    until(deployment.is_serving, "it serves")
    until(lambda: all(deployment.scene.shown(i) for i in "ab"), "both have tokens")

    if how == "remote":
        deployment.app.control.shutdown(destination=[node_name("w1")])
        code = process.wait(120)
    else:
        code = deployment.processes.stop("w1", getattr(signal, how), timeout_s=120)

    assert code == 0
    for request_id in "ab":
        record = deployment.scene.record(request_id)
        assert record.state is RequestState.QUEUED
        assert record.crashes == 0
        assert record.offset > 0
    assert deployment.executor.run(deployment.scene.reads.incarnations()) == []


def test_a_cold_shutdown_does_not_drain(deployment: Deployment) -> None:
    """SIGQUIT ends it amid its requests, given back or left to the lease; another worker goes on from there."""
    deployment.processes.worker("w1")
    deployment.enqueue("a", max_tokens=700)
    until(deployment.is_serving, "it serves")
    until(lambda: deployment.scene.shown("a"), "tokens are there")

    code = deployment.processes.stop("w1", signal.SIGQUIT)

    assert code != 0
    assert deployment.scene.record("a").state in (RequestState.RUNNING, RequestState.QUEUED)
    deployment.processes.worker("w2")
    until(deployment.is_in(RequestState.DONE, "a"), "w2 finishes it", timeout_s=120)
    assert len([t for entry in deployment.scene.shown("a") for t in entry]) == 700


def test_the_planners_tasks_are_not_taken_by_a_gpu_worker(deployment: Deployment) -> None:
    """They wait for a planner, whatever a GPU worker is told to consume."""
    deployment.processes.worker("w1")
    until(deployment.is_serving, "it serves")
    deployment.app.send_task("l4queue.replan")

    refused = deployment.app.control.add_consumer("l4-control", reply=True, timeout=2.0)
    grown = deployment.app.control.pool_grow(2, reply=True, timeout=2.0)

    assert "own control queue" in refused[0][node_name("w1")]["error"]
    assert "one engine" in grown[0][node_name("w1")]["error"]
    assert [q["name"] for q in deployment.inspect("active_queues")] == ["l4-workers"]
    with redis.Redis(port=deployment.broker.port) as broker:
        assert broker.llen("l4-celery:l4-control") == 1


@pytest.mark.parametrize(("fate", "says"), [("dies", "EngineDied"), ("ends", "ended by itself")])
def test_a_worker_without_its_engine_ends_with_an_error(deployment: Deployment, fate: str, says: str) -> None:
    """The supervisor is to see it at once."""
    process = deployment.processes.start("odd", ODD_WORKERS, fate, worker_id="odd")
    until(lambda: deployment.inspect("stats", "odd"), "it answers")

    deployment.app.control.revoke("cue")

    assert process.wait(120) == 1
    assert says in deployment.processes.log("odd")


def test_a_worker_that_cannot_be_built_ends_with_an_error(deployment: Deployment) -> None:
    """With the error in its log."""
    process = deployment.processes.start("odd", ODD_WORKERS, "fails", worker_id="odd")

    assert process.wait(300) == EXIT_CONFIG
    assert "no such model: set L4_MODEL" in deployment.processes.log("odd")


@pytest.mark.parametrize(("number", "deadline_s"), [(signal.SIGTERM, 15.0), (signal.SIGQUIT, 9.0)])
def test_a_worker_that_hangs_is_ended_with_its_children(
    deployment: Deployment, number: int, deadline_s: float
) -> None:
    """After the deadline of the drain; at once when the shutdown is cold."""
    deployment.processes.start("odd", ODD_WORKERS, "hangs", worker_id="odd", drain_s=0.5)
    until(lambda: deployment.inspect("stats", "odd"), "it answers")
    found = until(lambda: re.search(r"child (\d+)", deployment.processes.log("odd")), "its child is there")

    code = deployment.processes.stop("odd", number, timeout_s=deadline_s)

    assert code == 1
    until(lambda: not _is_running(int(found[1])), "the child is gone")


def test_a_broker_that_never_came_does_not_keep_the_engine_from_serving(deployment: Deployment) -> None:
    """Requests are served, and a signal still drains."""
    deployment.broker.kill()
    deployment.processes.worker("w1")
    deployment.enqueue("a", max_tokens=20)

    until(deployment.is_in(RequestState.DONE, "a"), "it is done", timeout_s=120)

    assert deployment.processes.stop("w1", timeout_s=120) == 0


def _is_running(pid: int) -> bool:
    try:
        return os.getpgid(pid) >= 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
