"""`l4queue up` as a user runs it: real processes, real Redis, real signals; the engine is the emulated one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from l4queue.cli.json_keys import KEYS
from l4queue.cli.stack.embedded import is_port_free
from l4queue.client import Client
from l4queue.observe.overview import read_overview
from l4queue.protocol.executor import Executor
from l4queue.redis_url import parse_url, redacted
from tests.protocol.server import RedisServer

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

L4QUEUE = Path(sys.executable).with_name("l4queue")
NAMES = {"redis", "dispatcher-0", "planner", "beat", "flower", "worker-0", "worker-1"}


class Up:
    """One running `l4queue up`, its output in a file."""

    def __init__(self, process: subprocess.Popen[bytes], place: Path) -> None:
        self.process = process
        self.place = place
        self.facts: dict[str, Any] = {}

    @property
    def output(self) -> str:
        return (self.place / "output").read_text()

    def wait_ready(self) -> None:
        self.wait_for(lambda: (self.place / "ready.json").exists())
        self.facts = json.loads((self.place / "ready.json").read_text())

    def wait_for(self, condition: Any, *, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)  # between looks at another process, which cannot signal us

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def running(place: Path, *arguments: str, stdout: Any = None, more: dict[str, str] | None = None) -> Iterator[Up]:
    command = [
        str(L4QUEUE), "up", "--engine", "emulated", "--data-dir", str(place / "data"),
        "--ready-file", str(place / "ready.json"), *arguments,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("L4_")}
    environment |= {"L4_EMULATED_SPEED": "0", "L4_MODEL": "tiny", **(more or {})}
    with (place / "output").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=stdout or output, stderr=output, env=environment, start_new_session=True, cwd=place
        )
        up = Up(process, place)
        family: list[psutil.Process] = []
        try:
            yield up
            family = up.family() if process.poll() is None else []
        finally:
            process.kill()
            process.wait()
            psutil.wait_procs(family, timeout=120)


def generated(url: str) -> int:
    """Tokens of one request through the whole path."""
    with Client(url) as client:
        return client.enqueue(prompt="How long is this?", max_tokens=5).result(timeout=120).output_tokens


def test_it_serves_survives_and_ends(tmp_path: Path) -> None:
    """From ready to Ctrl-C, with a worker and Redis killed in between."""
    with running(tmp_path) as up:
        up.wait_ready()
        url = up.facts["redis_url"]
        assert set(up.facts["pids"]) == NAMES
        assert list(up.facts) == list(KEYS["up"])
        assert generated(url) == 5
        with urllib.request.urlopen(up.facts["flower_url"] + "/healthcheck", timeout=120) as reply:
            assert reply.status == 200

        for name in ("worker-0", "redis"):
            os.kill(up.facts["pids"][name], signal.SIGKILL)
            up.wait_for(lambda name=name: f"{name} was ended by SIGKILL; starts again in" in up.output)
            up.wait_for(lambda: _workers(url) == ["worker-0", "worker-1"])
            assert generated(url) == 5
        assert "worker-0 said last, more in" in up.output
        told = l4queue("status", "--data-dir", str(tmp_path / "data"))
        assert told in "".join(line.split("| ", 1)[1] + "\n" for line in up.output.splitlines() if "| " in line)
        assert up.facts["export"] in told
        assert "Task l4queue.refine" not in up.output
        assert "l4queue.worker worker worker-0 ready" in (tmp_path / "data" / "logs" / "worker-0.log").read_text()

        family = up.family()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(120) == 0
        assert psutil.wait_procs(family, timeout=120)[1] == []
        assert "error" not in up.output.lower().split("stopping: workers drain first")[-1]
        prefixes = {line.split("|")[0].strip() for line in up.output.splitlines()}
        assert prefixes <= NAMES | {"l4queue"}
        assert f"ready: Redis at {redacted(url)}, Flower at {up.facts['flower_url']}" in up.output
        assert not (tmp_path / "ready.json").exists()


def test_a_second_one_on_the_same_redis_gets_other_names(tmp_path: Path) -> None:
    """Workers, planner, logs and facts; an old ready file is gone before it is ready, and both are told of."""
    second = tmp_path / "second"
    second.mkdir()
    (second / "ready.json").write_text("{}")
    with running(tmp_path, "--workers", "1", "--no-flower") as one:
        one.wait_ready()
        more = {"L4_REDIS_URL": one.facts["redis_url"]}
        where = ("--data-dir", str(tmp_path / "data"))
        with running(second, "--workers", "1", "--no-flower", *where, more=more) as two:
            two.wait_for(lambda: "which L4_REDIS_URL names" in two.output)
            assert not (second / "ready.json").exists()
            two.wait_ready()
            assert _workers(one.facts["redis_url"]) == ["worker-0", "worker-1"]
            assert "planner-1@" in two.output
            assert two.facts["logs"] == str(tmp_path / "data" / "up-2" / "logs")
            assert l4queue("status", *where).count("ready: Redis at") == 2


def l4queue(*arguments: str) -> str:
    """What a command prints."""
    done = subprocess.run([L4QUEUE, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_password_is_shown_to_nobody_and_clients_of_the_directory_have_it(tmp_path: Path) -> None:
    """Only in files of this user, which end with it. Flower's own variables say
    where Flower is."""
    flower_port = str(free_ports(1))
    own = {"FLOWER_PORT": flower_port, "FLOWER_URL_PREFIX": "flower"}
    with running(tmp_path, "--workers", "1", "--data-dir", ".l4queue", more=own) as up:
        up.wait_ready()
        url = up.facts["redis_url"]
        password = str(parse_url(url).password)
        program = (
            "from l4queue import Client; c = Client(); print(c.enqueue('a', max_tokens=5).result().output_tokens)"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("L4_")}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stdout == "5\n", done.stderr
        lines = [" ".join(process.cmdline()) for process in up.family()]
        assert len(lines) > 5
        assert [line for line in [*lines, *up.output.splitlines()] if password in line] == []
        for file in (tmp_path / ".l4queue" / "url", tmp_path / "ready.json"):
            assert password in file.read_text()
            assert file.stat().st_mode & 0o777 == 0o600
        assert up.facts["flower_url"] == f"http://127.0.0.1:{flower_port}/flower"
        with urllib.request.urlopen(up.facts["flower_url"] + "/api/workers", timeout=10) as reply:
            assert reply.status == 200

        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(90) == 0
        assert not (tmp_path / ".l4queue" / "url").exists()


def test_a_flower_that_fails_holds_nothing_up(tmp_path: Path) -> None:
    """It says so, and all else serves."""
    with running(tmp_path, "--workers", "1", more={"FLOWER_MAX_TASKS": "many"}) as up:
        up.wait_ready()
        assert generated(up.facts["redis_url"]) == 5
        assert "flower is not ready, and all else serves: error: FLOWER_MAX_TASKS: many is no int" in up.output


def test_a_password_of_a_redis_of_ones_own_is_not_shown(tmp_path: Path, redis_executable: str) -> None:
    """Whatever it is made of; queue and broker log in with it."""
    secret = "a/b#c ?d@e:f%g"
    server = RedisServer(redis_executable, tmp_path, password=secret).start()
    try:
        more = {"L4_REDIS_URL": server.url, "L4_REDIS_PASSWORD": secret}
        with running(tmp_path, "--workers", "1", "--no-flower", more=more) as up:
            up.wait_ready()
            assert generated(up.facts["redis_url"]) == 5
            lines = [" ".join(process.cmdline()) for process in up.family()]
            shown = (secret, quote(secret, safe=""))
            assert [line for line in [*lines, *up.output.splitlines()] if any(s in line for s in shown)] == []
    finally:
        server.kill()


def _workers(url: str) -> list[str]:
    executor = Executor(url, retry_s=30.0)
    try:
        return sorted(load.worker_id for load in read_overview(executor, "l4").workers)
    finally:
        executor.close()


def test_nothing_outlives_it_when_it_is_killed(tmp_path: Path) -> None:
    """SIGKILL gives it no chance to stop its children; and its data directory is free at once."""
    with running(tmp_path, "--workers", "1", "--no-flower") as up:
        up.wait_ready()
        assert set(up.facts["pids"]) == NAMES - {"flower", "worker-1"}
        assert up.facts["flower_url"] is None
        family = up.family()
        assert len(family) >= 5

        up.process.kill()

        assert psutil.wait_procs(family, timeout=120)[1] == []


def test_every_process_serves_metrics_from_one_port_on(tmp_path: Path) -> None:
    """What the targets file names answers with what belongs there; two workers do not collide."""
    with running(tmp_path, "--no-flower", "--metrics-port", str(free_ports(4))) as up:
        up.wait_ready()
        urls = up.facts["metrics_urls"]
        assert list(urls) == ["exporter", "dispatcher-0", "worker-0", "worker-1"]
        assert generated(up.facts["redis_url"]) == 5
        named = json.loads((tmp_path / "data" / "prometheus-targets.json").read_text())
        found = {}
        for group in named:
            with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=120) as reply:
                found[group["labels"]["process"]] = reply.read().decode()
        assert found.keys() == urls.keys()
        assert "l4queue_redis_up 1.0" in found["exporter"]
        assert 'l4queue_requests_finished_total{state="done"} 1.0' in found["exporter"]
        assert "l4queue_dispatcher_round_seconds_count 1.0" in found["dispatcher-0"]
        for name in ("worker-0", "worker-1"):
            assert f'l4queue_worker_running_requests{{worker="{name}"}} 0.0' in found[name]
        assert up.facts["pids"].keys() == NAMES - {"flower"} | {"exporter"}


def free_ports(number: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    first = 20_000 + os.getpid() % 10_000
    while not all(is_port_free(port) for port in range(first, first + number)):
        first += number
    return first


def test_it_ends_when_nobody_reads_its_output(tmp_path: Path) -> None:
    """`l4queue up | head -1` leaves nothing behind."""
    with running(tmp_path, "--workers", "1", "--no-flower", stdout=subprocess.PIPE) as up:
        assert up.process.stdout is not None
        assert up.process.stdout.readline().startswith(b"l4queue    | starting redis-server")
        up.process.stdout.close()

        assert up.process.wait(120) == 0


def test_what_cannot_start_is_one_error(tmp_path: Path) -> None:
    """A data directory in use, a model that is not there, and a port for a Redis that the environment names."""
    with running(tmp_path, "--workers", "1", "--no-flower") as up:
        url = tmp_path / "data" / "url"
        up.wait_for(url.exists)
        for arguments, message in (
            (("--data-dir", str(tmp_path / "data")), "error: data directory"),
            (("--data-dir", str(tmp_path / "other"), "--model", "/nonexistent"), "error: model /nonexistent"),
            (("--data-dir", str(tmp_path / "other"), "--dispatchers", "0"), "error: --dispatchers 0: nothing"),
            (
                ("--data-dir", str(tmp_path / "other"), "--redis-url", "redis://h", "--redis-port", "7000"),
                "error: --redis-port 7000 starts a Redis here, and --redis-url names the one at redis://h",
            ),
        ):
            done = subprocess.run(
                [L4QUEUE, "up", "--engine", "emulated", *arguments],
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip

            assert done.returncode == 1
            assert done.stderr.startswith(message)
            assert done.stderr.count("\n") == 1
        assert url.exists()  # clients still find the one that runs


@pytest.mark.parametrize(
    ("engine", "variable", "says", "has_begun"),
    [
        ("vllm", "L4_MAX_MODEL_LEN=513", r"model \S+ holds 512 tokens, and L4_MAX_MODEL_LEN is 513: .*", False),
        ("emulated", "L4_EMULATED_GPU=none", r"worker-0: no coefficients for model .* on GPU 'none'; .*", True),
    ],
)
def test_a_configuration_error_is_told_and_not_retried(
    engine: str, variable: str, says: str, has_begun: bool, tmp_path: Path
) -> None:
    """Before anything starts where that can be seen; else by the process that meets it, at its first start."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"max_position_embeddings": 512}')
    name, _, value = variable.partition("=")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("L4_")} | {name: value}
    arguments = ["--engine", engine, "--model", str(model) if engine == "vllm" else "tiny", "--no-flower"]
    done = subprocess.run(
        [L4QUEUE, "up", "--workers", "1", "--data-dir", str(tmp_path / "data"), *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert re.fullmatch(rf"error: {says}\n", done.stderr)
    assert ("worker-0 ended with exit code 78 and is not started again" in done.stdout) is has_begun
    assert (tmp_path / "data" / "redis").exists() is has_begun
