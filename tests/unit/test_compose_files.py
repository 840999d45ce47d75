"""docker-compose.yml and .env.example agree with the settings and with each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import yaml

from l4queue.cli.stack.embedded import free_port
from l4queue.config import load_settings
from l4queue.errors import ServiceUnavailable
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import Executor
from tests.services.processes import until

ROOT = Path(__file__).resolve().parents[2]
OURS = ("dispatcher", "planner", "beat", "flower", "worker", "gateway", "exporter")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Services as a YAML parser reads them."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    return found


def test_every_variable_and_setting_is_written_down() -> None:
    """Otherwise: python tools/generate_env_example.py."""
    command = [sys.executable, str(ROOT / "tools" / "generate_env_example.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_service_is_watched_restarted_bounded_and_stopped_gently(services: dict[str, Any]) -> None:
    """Redis as well as ours."""
    for name in ("redis", *OURS):
        service = services[name]
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name
        assert service["mem_limit"], name
        assert service["stop_grace_period"], name


def test_our_containers_have_no_capabilities_and_wait_for_redis(services: dict[str, Any]) -> None:
    """And none opens a port to the network by itself."""
    for name in OURS:
        assert services[name]["cap_drop"] == ["ALL"], name
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy", name
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith(("127.0.0.1:", "${FLOWER_BIND:-127.0.0.1}:", "${HTTP_BIND:-127.0.0.1}:")), (
                name,
                port,
            )


def test_workers_share_their_locks_and_nothing_names_a_replica(services: dict[str, Any]) -> None:
    """A fixed worker id or container name would stop at the second replica."""
    worker = services["worker"]
    assert "devices:/var/lib/l4queue/devices" in worker["volumes"]
    assert "container_name" not in worker
    assert "L4_WORKER_ID" not in worker["environment"]
    assert worker["environment"]["L4_DEVICES_DIR"] == "/var/lib/l4queue/devices"


def filled(value: str, variables: dict[str, str]) -> str:
    """A string of a compose file with its variables, as Compose fills them in; KeyError where one is demanded."""

    def one(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        given = variables.get(found["name"], "")
        if found["sign"] == ":?" and not given:
            raise KeyError(found["name"])
        return given or found["default"] or ""

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?:(?P<sign>:[-?])(?P<default>[^}]*))?\}", one, value)


def test_no_password_has_a_default_or_stands_in_a_url_or_command_line(services: dict[str, Any]) -> None:
    """An empty one opens Redis to its network, one in a URL breaks it, and any user reads a command line."""
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    for name in ("REDIS_PASSWORD", "DASHBOARD_PASSWORD"):
        uses = re.findall(rf"^(.*)\$\{{{name}([^}}]*)\}}", text, re.MULTILINE)
        assert uses, name
        for before, rest in uses:
            assert rest == ":?choose one in .env"
            assert re.fullmatch(r"\s*\w+: (\$\{DASHBOARD_USER:-admin\}:)?", before)
    for name in OURS:
        environment = services[name]["environment"]
        with pytest.raises(KeyError, match="REDIS_PASSWORD"):
            filled(environment["L4_REDIS_PASSWORD"], {})
    assert "FLOWER_BASIC_AUTH" not in services["flower"]["environment"]  # a comma in it ends a login


@pytest.mark.services
@pytest.mark.parametrize(
    "password", ["simple", "a b/c#d?e@f:g%h", "'\"\\$HOME`id`", "\\x41;requirepass x", "häß€ \\"]
)
def test_the_command_of_redis_takes_every_password(
    services: dict[str, Any], password: str, tmp_path: Path, redis_executable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very lines of the file, with the settings that our containers get."""
    port = free_port()
    service = services["redis"]
    variables = {"REDIS_PASSWORD": password}
    command = [filled(part, variables) for part in service["command"]]
    environment = {name: filled(value, variables) for name, value in service["environment"].items()}
    command = [str(tmp_path) if part == "/data" else part for part in command]
    more = ["--port", str(port), "--bind", "127.0.0.1"]
    path = f"{Path(redis_executable).parent}:/bin:/usr/bin"
    with subprocess.Popen([*command, *more], env=environment | {"PATH": path}) as server:
        try:
            with redis.Redis(port=port, password=password, decode_responses=True) as client:
                until(lambda: server.poll() is not None or _is_up(client), "Redis answers")
                assert client.config_get("appendfsync")["appendfsync"] == "always"
            assert password not in " ".join(psutil.Process(server.pid).cmdline())
            ours = services["dispatcher"]["environment"]
            monkeypatch.setenv("L4_REDIS_URL", ours["L4_REDIS_URL"].replace("redis:6379", f"127.0.0.1:{port}"))
            monkeypatch.setenv("L4_REDIS_PASSWORD", filled(ours["L4_REDIS_PASSWORD"], variables))
            executor = Executor(load_settings().redis_url, retry_s=0.0)
            assert executor.run(Call(None, (), ("GET", "a"), lambda reply: reply)) is None
            executor.close()
            monkeypatch.setenv("L4_REDIS_PASSWORD", "")
            executor = Executor(load_settings().redis_url, retry_s=0.0)
            with pytest.raises(ServiceUnavailable):
                executor.run(Call(None, (), ("GET", "a"), lambda reply: reply))
            executor.close()
        finally:
            server.terminate()


def _is_up(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.services
def test_an_empty_password_is_refused_by_the_container_as_well(services: dict[str, Any]) -> None:
    """Where another tool than Compose fills the variables in."""
    command = [filled(part, {"REDIS_PASSWORD": "x"}) for part in services["redis"]["command"]]
    environment = {"PATH": "/bin:/usr/bin", "REDISCLI_AUTH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (1, "REDIS_PASSWORD is empty: choose one in .env\n")
