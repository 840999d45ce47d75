"""The planner as ordinary Celery: real beats, real planner workers, a real broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from dispatcher.app import make_app, steady_now
from dispatcher.planner.tasks import REPLAN
from l4queue.config import load_settings
from l4queue.observe.overview import price_in_force, read_overview
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from tests.protocol.server import RedisServer
from tests.services.processes import Processes, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

CELERY = ("-m", "celery", "-A", "dispatcher.app")


@pytest.fixture
def server(redis_executable: str, tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(redis_executable, folder).start()
    yield server
    server.kill()


@pytest.fixture
def processes(tmp_path: Path, server: RedisServer) -> Iterator[Processes]:
    processes = Processes(tmp_path, redis_url=server.url, replan_interval_s=1.0, plan_min_life_s=0.0)
    yield processes
    processes.close()


@pytest.fixture
def reads() -> Reads:
    return Reads(Keys("l4"))


@pytest.fixture
def executor(server: RedisServer) -> Iterator[Executor]:
    executor = Executor(server.url)
    yield executor
    executor.close()


def test_two_beats_and_two_planners_make_one_history_of_plans(
    processes: Processes, executor: Executor, reads: Reads
) -> None:
    """Rounds go on, versions rise by one, nothing piles up, nobody fails."""
    processes.worker("w1", engine="emulated")
    until(lambda: executor.run(reads.incarnations()), "a worker is there", timeout_s=120)
    for number in "12":
        processes.start(f"planner{number}", *CELERY, "worker", "-l", "INFO", "-n", f"planner{number}@%h")
        processes.start(f"beat{number}", *CELERY, "beat", "--pidfile=")

    def versions() -> list[int]:
        return [version for _, version, _ in executor.run(reads.plan_history(count=100))]

    until(lambda: len(versions()) >= 1, "a plan for one worker", timeout_s=120)
    processes.worker("w2", engine="emulated")
    until(lambda: len(versions()) >= 2, "a plan for two workers", timeout_s=120)
    assert processes.stop("w2") == 0
    until(lambda: len(versions()) >= 3, "a plan for one worker again", timeout_s=120)
    until(lambda: len(executor.run(reads.decisions(count=100))) >= 10, "ten rounds", timeout_s=120)

    assert sorted(versions()) == list(range(1, len(versions()) + 1))
    for name in ("planner1", "planner2"):
        assert "Traceback" not in processes.log(name)
        assert f"Task {REPLAN}" in processes.log(name)
        assert processes.stop(name) == 0
    assert not list(Path(processes.folder).glob("celerybeat*"))


def test_the_planner_knows_what_a_move_costs_here(processes: Processes, executor: Executor, reads: Reads) -> None:
    """Workers tell what they can: the KV cache at 50 GB/s, or to prefill again where one cannot do better."""
    processes.worker("w1", engine="emulated", emulated_kv_bytes_per_s=50e9)
    until(lambda: executor.run(reads.incarnations()), "a worker is there", timeout_s=120)
    price = price_in_force(read_overview(executor, "l4"))
    processes.worker("w2", engine="emulated", emulated_kv_bytes_per_s=0)
    until(lambda: len(executor.run(reads.incarnations())) == 2, "another one is there", timeout_s=120)

    assert (price.bandwidth_bytes_per_s, price.kv_bytes_per_token) == (50e9, 131_072)
    assert price_in_force(read_overview(executor, "l4")).bandwidth_bytes_per_s is None


def test_a_round_that_comes_too_late_is_dropped(server: RedisServer, processes: Processes) -> None:
    """Beats without a planner leave tasks: a planner that comes back works off no backlog, whatever clocks say."""
    processes.start("beat", *CELERY, "beat", "--pidfile=")
    with redis.Redis(port=server.port, db=1) as broker:
        until(lambda: broker.llen("l4-celery:l4-control") >= 3, "three rounds wait", timeout_s=120)
        assert processes.stop("beat") == 0
        waiting = broker.llen("l4-celery:l4-control")

        processes.start("planner", *CELERY, "worker", "-l", "INFO", "-n", "planner@%h")
        until(lambda: broker.llen("l4-celery:l4-control") == 0, "it has taken them", timeout_s=120)
        until(lambda: processes.log("planner").count("] received") == waiting, "it has seen them")
        until(lambda: "no round: one has just ended" in processes.log("planner"), "it drops what is late")
        assert "expires: [" not in processes.log("planner")


def test_the_schedule_comes_from_the_settings() -> None:
    """Every `replan_interval_s`; without an expiry, which would compare the clocks of two hosts."""
    app = make_app(load_settings(replan_interval_s=7.0))

    entry = app.conf.beat_schedule["replan"]

    assert entry["schedule"].seconds == 7.0
    assert entry["schedule"].nowfun is steady_now
    assert "expires" not in entry.get("options", {})
    assert app.conf.accept_content == ["json"]
    assert app.tasks[REPLAN].ignore_result
    assert app.tasks[REPLAN].acks_late
