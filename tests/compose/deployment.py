"""The deployment under test: docker-compose.yml with a .env of its own, and what its containers do."""

from __future__ import annotations

import json
import secrets
import time
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from l4queue.cli.stack.embedded import free_port
from l4queue.config import Settings
from tests.compose.console import check, execute, say, until
from tests.compose.daemon import compose_command
from tests.compose.images import PREFIX, BaseImages, size_of

__all__ = ("Deployment",)

ROOT = Path(__file__).resolve().parents[2]
_KILL = """
import os, signal, sys
for name in os.listdir('/proc'):
    if name.isdigit() and int(name) not in (1, os.getpid()):
        words = open(f'/proc/{name}/cmdline', 'rb').read().split(b'\\0')
        if words[1:3] == [b'-m', sys.argv[1].encode()]:
            os.kill(int(name), signal.SIGKILL)
            sys.exit()
sys.exit('no such process')
"""


class Deployment:
    """One compose project. Ports and passwords are its own; images and volumes begin with `l4queue-test`."""

    def __init__(self, environment: Mapping[str, str], folder: Path, images: BaseImages, **settings: str) -> None:
        self.folder = folder
        self.project = PREFIX
        self.password = secrets.token_hex(8)
        self.redis_password = secrets.token_hex(8)
        self.redis_port, self.flower_port = free_port(), free_port()
        self.log = folder / "compose.log"
        values = {
            "DASHBOARD_USER": "operator",
            "DASHBOARD_PASSWORD": self.password,
            "REDIS_PASSWORD": self.redis_password,
            "REDIS_PORT": str(self.redis_port),
            "FLOWER_PORT": str(self.flower_port),
            "HEALTH_INTERVAL": "10s",
            "BASE_IMAGE": images.base,
            "BUILD_IMAGE": images.build,
            "REDIS_IMAGE": images.redis,
            "IMAGE_PREFIX": PREFIX,
            "DEVICES_VOLUME": f"{PREFIX}-devices",
            **settings,
        }
        self.base_args = {"BASE_IMAGE": images.base, "BUILD_IMAGE": images.build}
        self.worker_target = values.get("WORKER_TARGET", "worker-cpu")
        folder.mkdir(parents=True, exist_ok=True)
        self._env_file = folder / "test.env"
        self._env_file.write_text("".join(f"{k}={v}\n" for k, v in values.items()), "utf-8")
        ours = ("L4_", *(k for k in values))  # the shell's values would win over the file's
        self.environment = {k: v for k, v in environment.items() if not k.startswith(ours)}

    @property
    def settings(self) -> Settings:
        """Of a client on this machine."""
        url = f"redis://127.0.0.1:{self.redis_port}/0"
        return Settings(redis_url=url, redis_password=self.redis_password, _env_file=None)  # type: ignore[call-arg]  # pydantic-settings' own

    def compose(self, *arguments: str, timeout_s: float = 1800.0) -> str:
        """Run compose on this project."""
        command = (*compose_command(), "--env-file", str(self._env_file), "-p", self.project)
        files = ("-f", str(ROOT / "docker-compose.yml"))
        return execute(
            *command, *files, *arguments, environment=self.environment, cwd=ROOT, log=self.log, timeout_s=timeout_s
        )

    def docker(self, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
        """Run docker beside it."""
        return execute("docker", *arguments, environment=self.environment, allowed=allowed)

    def build(self) -> None:
        """Build the images of this project with compose."""
        for service, image in (("dispatcher", "services"), ("worker", self.worker_target)):
            started_s = time.monotonic()
            self.compose("build", service)
            name = f"{PREFIX}-{image}:latest"
            say(f"built {name} in {time.monotonic() - started_s:.0f} s, {size_of(name, self.environment)}")

    def up(self, *, workers: int) -> None:
        """Bring up or change the number of workers."""
        started_s = time.monotonic()
        self.compose("up", "--detach", "--no-build", "--scale", f"worker={workers}")
        say(f"compose up --scale worker={workers} returned after {time.monotonic() - started_s:.1f} s")

    def containers(self, service: str, *, running_only: bool = True) -> list[dict[str, Any]]:
        """`docker inspect` of a service's containers, oldest first."""
        filters = ["--filter", f"label=com.docker.compose.project={self.project}"]
        filters += ["--filter", f"label=com.docker.compose.service={service}"]
        ids = self.docker("ps", *([] if running_only else ["--all"]), "--quiet", *filters).split()
        if not ids:
            return []
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", *ids, allowed=(0, 1)))
        return sorted(found, key=lambda one: str(one["Created"]))

    def health(self) -> dict[str, list[str]]:
        """Health of every running container by service."""
        services = ("redis", "dispatcher", "planner", "beat", "flower", "worker")
        return {
            name: [str(one["State"].get("Health", {}).get("Status")) for one in self.containers(name)]
            for name in services
        }

    def wait_healthy(self, *, workers: int, timeout_s: float = 240.0) -> None:
        """Until every service is healthy by its own health check."""

        def is_healthy() -> bool:
            health = self.health()
            return len(health["worker"]) == workers and all(
                states and set(states) == {"healthy"} for states in health.values()
            )

        until(is_healthy, f"every container is healthy, {workers} worker(s) among them", timeout_s=timeout_s)

    def crash(self, service: str, module: str) -> str:
        """SIGKILL the process of one container from within; its restart policy is to bring it back."""
        one = self.containers(service)[0]
        self.docker("exec", one["Id"], "python", "-c", _KILL, module)
        return str(one["Id"])

    def restarts(self, container_id: str) -> int:
        """How often the daemon restarted it."""
        return int(self.docker("inspect", "--format", "{{.RestartCount}}", container_id))

    def exit_codes(self, service: str, *, since_s: float) -> list[int]:
        """Exit codes of the service's containers that ended since a time of `time.time()`."""
        listed = self.docker(
            "events", "--since", f"{since_s:.3f}", "--until", f"{time.time():.3f}", "--format", "{{json .}}",
            "--filter", "event=die", "--filter", f"label=com.docker.compose.service={service}",
            "--filter", f"label=com.docker.compose.project={self.project}",
        )  # fmt: skip
        return [int(json.loads(line)["Actor"]["Attributes"]["exitCode"]) for line in listed.splitlines()]

    def flower(self, path: str, *, password: str | None = None) -> tuple[int, str]:
        """Status and body of a page of Flower."""
        url = f"http://127.0.0.1:{self.flower_port}{path}"
        request = Request(url)
        if password is not None:
            login = b64encode(f"operator:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        try:
            with urlopen(request, timeout=20) as reply:
                return reply.status, reply.read().decode()
        except HTTPError as error:
            return error.code, ""

    def logs(self, service: str) -> str:
        """What its containers wrote."""
        return self.compose("logs", "--no-color", service)

    def down(self) -> None:
        """Take everything down, volumes included, and see that nothing is left."""
        self.compose("down", "--volumes", "--timeout", "60")
        label = f"label=com.docker.compose.project={self.project}"
        left = [
            self.docker(what, "ls", "--quiet", "--filter", label) for what in ("container", "volume", "network")
        ]
        check(not any(left), "compose down left no container, volume or network")
