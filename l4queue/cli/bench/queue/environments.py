"""Environments of the peers: made once for each set of pins, below the user's cache directory, and kept there."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from l4queue.cli.bench.queue.peers import Peer
from l4queue.cli.stack.process import die_with_parent
from l4queue.errors import ConfigError
from l4queue.model_cache import cache_directory

__all__ = ("environment_of", "require_tools")

_MIN_NODE = 18  # the oldest of a maintained line when BullMQ 6 came out; it asks for 14.18 itself
_READY = ".l4queue-ready"  # there once all is installed
_NUM_LAST_LINES = 12  # of an installer that fails


def require_tools(peers: list[Peer]) -> None:
    """ConfigError where a peer needs a program that is missing."""
    for peer in peers:
        missing = [tool for tool in ("node", "npm") if peer.is_node and shutil.which(tool) is None]
        if missing:
            raise ConfigError(
                f"--peers {peer.name} needs {' and '.join(missing)}: install Node.js {_MIN_NODE} or newer, "
                "or leave this peer out"
            )


async def environment_of(peer: Peer, *, note: Callable[[str], None]) -> Path:
    """Its folder, made first if need be; ConfigError where that fails."""
    pins = "\n".join((*peer.pins, "" if peer.is_node else sys.version))
    digest = hashlib.sha256(pins.encode()).hexdigest()[:12]
    target = cache_directory() / "bench-queue" / f"{peer.name}-{digest}"
    if (target / _READY).exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    async with _locked(target.with_suffix(".lock")):
        if not (target / _READY).exists():
            note(f"installing {', '.join(peer.pins)} into {target}, once")
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for command in _node_commands(peer, target) if peer.is_node else _python_commands(peer, target):
                await _run(command, peer)
            (target / _READY).touch()
    return target


def _node_commands(peer: Peer, target: Path) -> list[list[str]]:
    quiet = ("--no-fund", "--no-audit", "--loglevel", "error")
    return [["npm", "install", "--prefix", str(target), *quiet, *peer.pins]]


def _python_commands(peer: Peer, target: Path) -> list[list[str]]:
    python = str(target / "bin" / "python")
    beside = Path(sys.executable).with_name("uv")
    uv = shutil.which("uv") or (str(beside) if beside.exists() else None)
    if uv is not None:
        make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(target)]
        return [make, [uv, "pip", "install", "--quiet", "--python", python, *peer.pins]]
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.pins]
    return [[sys.executable, "-m", "venv", str(target)], install]


async def _run(command: list[str], peer: Peer) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )
    try:
        said, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines()[-_NUM_LAST_LINES:]
        text = "".join(f"\n    {line}" for line in lines)
        raise ConfigError(f"--peers {peer.name}: {Path(command[0]).name} cannot install {peer.pins[0]}:{text}")


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Another run that installs the same is waited for; the lock ends with its process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
