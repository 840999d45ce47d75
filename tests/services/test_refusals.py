"""A Redis that refuses for a while: every process waits, says so once, and goes on. No engine loads again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from l4queue import Settings
from l4queue.cli.stack.embedded import free_port
from l4queue.models import RequestState
from l4queue.protocol.executor import Executor
from tests.protocol.scene import Scene
from tests.protocol.server import DURABLE, RedisServer
from tests.services.processes import Processes, until

pytestmark = [pytest.mark.services]

CELERY = ("-m", "celery", "--quiet", "-A", "dispatcher.app")
NAMES = ("w1", "w2", "d1", "planner", "beat", "exporter")
SAID = re.compile(r"WARNING l4queue\.redis Redis at \S+ (?!serves again)(.*)")
OVER = re.compile(r"WARNING l4queue\.redis Redis at \S+ serves again")


@dataclass(frozen=True)
class Refusal:
    """A way in which Redis refuses: how it begins and ends, and the words that operators look for."""

    begin: Callable[[RedisServer, redis.Redis], object]
    end: Callable[[RedisServer, redis.Redis], object]
    words: str
    says: tuple[str, ...] = ("w1", "w2", "d1")
    num_refused: int = 150
    """So many refusals are waited for: beat, planner and Celery's side of the workers have met some by then."""


def _break_snapshots(server: RedisServer, admin: redis.Redis) -> None:
    """A directory where the snapshot belongs: what a full disk does."""
    folder = Path(admin.config_get("dir")["dir"]) / "dump.rdb"
    folder.mkdir()
    (folder / "in the way").touch()
    admin.config_set("save", "3600 1")
    admin.bgsave()
    until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err", "the snapshot failed")


def _mend_snapshots(server: RedisServer, admin: redis.Redis) -> None:
    shutil.rmtree(Path(admin.config_get("dir")["dir"]) / "dump.rdb")
    admin.bgsave()


def _deny(server: RedisServer, admin: redis.Redis) -> None:
    admin.execute_command("ACL", "SETUSER", "default", "-@scripting", "-@blocking", "-set")


def _set_password(server: RedisServer, admin: redis.Redis) -> None:
    admin.config_set("requirepass", "new")
    admin.execute_command("CLIENT", "KILL", "USER", "default", "SKIPME", "yes")


def _lower_maxclients(server: RedisServer, admin: redis.Redis) -> None:
    admin.config_set("maxclients", 1)
    admin.execute_command("CLIENT", "KILL", "USER", "default", "SKIPME", "yes")


REFUSALS = {
    "snapshot": Refusal(_break_snapshots, _mend_snapshots, r"disk full\?.*MISCONF"),
    "memory": Refusal(
        lambda _, admin: admin.config_set("maxmemory", 1),
        lambda _, admin: admin.config_set("maxmemory", 0),
        "memory limit",
        says=("d1",),
        num_refused=25,
    ),
    "password": Refusal(
        _set_password, lambda _, admin: admin.config_set("requirepass", ""), "refuses the credentials"
    ),
    "rights": Refusal(
        _deny,
        lambda _, admin: admin.execute_command("ACL", "SETUSER", "default", "+@all"),
        "denies this user",
    ),
    "connections": Refusal(
        _lower_maxclients, lambda _, admin: admin.config_set("maxclients", 5000), "no more connections"
    ),
}


def _num_refused(admin: redis.Redis) -> int:
    stats = admin.info("stats")
    return int(stats["total_error_replies"]) + int(stats["rejected_connections"])


class Deployment:
    """Every service as a process of its own, queue and broker in one Redis."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        settings = {"redis_url": server.url, "engine": "emulated", "model": "tiny", "lease_s": 2.0}
        self.settings = Settings(**settings, _env_file=None)  # type: ignore[arg-type,call-arg]
        self.processes = Processes(folder, refine_interval_s=1.0, replan_interval_s=2.0, **settings)
        self.executor = Executor(server.url)
        self.scene = Scene(self.executor, self.settings.namespace)
        start = self.processes.start
        self.children = {
            "w1": self.processes.worker("w1"),
            "w2": self.processes.worker("w2"),
            "d1": start("d1", "-m", "dispatcher"),
            "planner": start("planner", *CELERY, "worker", "-P", "solo", "-Q", "l4-control", "-l", "INFO"),
            "beat": start("beat", *CELERY, "beat", "--pidfile="),
            "exporter": start("exporter", "-m", "dispatcher.exporter", metrics_port=free_port()),
        }

    def submit(self, request_id: str, max_tokens: int) -> None:
        """Accept a request; the dispatcher routes it."""
        body = f'{{"params": {{"max_tokens": {max_tokens}, "ignore_eos": true}}}}'
        self.scene.submit(request_id, body=body, max_live_tokens=10**9)

    def is_in(self, state: RequestState, *ids: str) -> Callable[[], bool]:
        """Whether all of them are in this state."""
        return lambda: all(self.scene.state(request_id) is state for request_id in ids)

    def said(self, name: str, pattern: re.Pattern[str]) -> list[str]:
        """Lines of a process that match."""
        return [line for line in self.processes.log(name).splitlines() if pattern.search(line)]

    def close(self) -> None:
        """Leave nothing behind."""
        self.processes.close()
        self.scene.close()
        self.executor.close()


@pytest.fixture
def server(redis_executable: str, tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(redis_executable, folder, DURABLE).start()
    yield server
    server.kill()


@pytest.fixture
def admin(server: RedisServer) -> Iterator[redis.Redis]:
    """The operator's connection, which stays open and has all rights."""
    with redis.Redis(port=server.port) as first:
        first.execute_command("ACL", "SETUSER", "operator", "on", ">o", "~*", "&*", "+@all")
    with redis.Redis(
        port=server.port, username="operator", password="o", single_connection_client=True, decode_responses=True
    ) as client:
        client.ping()
        yield client


@pytest.fixture
def deployment(server: RedisServer, tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(server, tmp_path)
    yield deployment
    deployment.close()


@pytest.mark.parametrize("name", REFUSALS)
def test_processes_wait_for_what_an_operator_can_mend(
    deployment: Deployment, server: RedisServer, admin: redis.Redis, name: str
) -> None:
    """All keep their process ids, requests finish, and each outage is one line and one line at its end."""
    refusal, d = REFUSALS[name], deployment
    for worker in ("w1", "w2"):
        until(lambda: " ready: " in d.processes.log(worker), "it serves", timeout_s=60)  # noqa: B023
    until(lambda: "exporter ready" in d.processes.log("exporter"), "it exports", timeout_s=60)
    until(lambda: "succeeded" in d.processes.log("planner"), "it plans", timeout_s=60)
    d.submit("running", 3000)
    d.submit("first", 4)
    until(d.is_in(RequestState.DONE, "first"), "it serves")
    until(d.is_in(RequestState.RUNNING, "running"), "it runs")

    refusal.begin(server, admin)
    for process in refusal.says:
        until(lambda: d.said(process, SAID), f"{process} says so", timeout_s=60)  # noqa: B023
    before = _num_refused(admin)
    until(lambda: _num_refused(admin) - before >= refusal.num_refused, "all have met it", timeout_s=90)
    refusal.end(server, admin)
    for process in refusal.says:
        until(lambda: d.said(process, OVER), f"{process} goes on", timeout_s=60)  # noqa: B023
    d.submit("later", 4)
    until(d.is_in(RequestState.DONE, "running", "later"), "all end", timeout_s=90)

    assert {process: child.poll() for process, child in d.children.items()} == dict.fromkeys(NAMES)
    for process in ("w1", "w2", "d1", "exporter"):
        said = d.said(process, SAID)
        known = [line for line in said if "trouble=away" not in line]  # broken connections are seen before why
        assert len(known) <= 1, said
        assert len(said) - len(known) <= (name == "connections"), said
        assert all(re.search(refusal.words, line) for line in known), said
        assert len(d.said(process, OVER)) == bool(said)
    record = d.executor.run(d.scene.reads.record("running"))
    assert record is not None
    assert record.crashes == 0


def test_a_dispatcher_ends_while_redis_refuses(server: RedisServer, admin: redis.Redis, tmp_path: Path) -> None:
    """Within `L4_DRAIN_S`: what it has in hand is for others."""
    processes = Processes(tmp_path, redis_url=server.url, model="tiny", drain_s=1.0)
    try:
        processes.start("d1", "-m", "dispatcher")
        until(lambda: " ready: " in processes.log("d1"), "it serves", timeout_s=60)
        _set_password(server, admin)
        until(lambda: SAID.search(processes.log("d1")), "it says so", timeout_s=60)
        before = _num_refused(admin)
        until(lambda: _num_refused(admin) >= before + 30, "upkeep has met it, too", timeout_s=60)

        assert processes.stop("d1") == 0
        assert "others adopt it" in processes.log("d1")
    finally:
        processes.close()


@pytest.mark.parametrize("when", ["serving", "starting"])
def test_a_worker_ends_while_redis_refuses(
    server: RedisServer, admin: redis.Redis, tmp_path: Path, when: str
) -> None:
    """Within `L4_DRAIN_S`, with one line; it has not failed. Its requests go on elsewhere."""
    processes = Processes(tmp_path, redis_url=server.url, engine="emulated", model="tiny", drain_s=1.0)
    scene = Scene(Executor(server.url), Settings(_env_file=None).namespace)  # type: ignore[call-arg]
    try:
        if when == "starting":
            _set_password(server, admin)
        processes.worker("w1")
        until(lambda: " ready: " in processes.log("w1"), "its engine runs", timeout_s=60)
        if when == "serving":
            until(lambda: scene.executor.run(scene.reads.incarnations()), "it serves", timeout_s=60)
            _set_password(server, admin)
        until(lambda: SAID.search(processes.log("w1")), "it says so", timeout_s=60)

        assert processes.stop("w1") == 0, processes.log("w1")
        log = processes.log("w1")
        says = "others go on when the lease" if when == "serving" else "stopped before Redis served"
        assert len(re.findall(says, log)) == 1
        assert "CRITICAL l4queue" not in log
    finally:
        processes.close()
        scene.close()
        scene.executor.close()
