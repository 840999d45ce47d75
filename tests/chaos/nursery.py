"""Processes that start in milliseconds and die at once: forked from one that has imported everything.

`python -m tests.chaos.nursery` reads a JSON line for each process to start and writes one for each start and
each end. When its input ends it kills all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

__all__ = ("Nursery",)

_LOOK_S = 0.02
_START_S = 300.0  # far more than it takes: only a nursery that is dead is to be noticed


class Nursery:
    """Starts roles of `tests.chaos.roles` as processes; `ended` yields (name, pid, status) of each end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._started: dict[str, asyncio.Future[int]] = {}
        self.pids: dict[str, int] = {}
        self.ended: asyncio.Queue[tuple[str, int, int]] = asyncio.Queue()

    async def open(self) -> None:
        """Start the process that all others are forked from."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("L4_")}
        one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        root = str(Path(__file__).parents[2])
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.chaos.nursery",
            str(self._folder),
            cwd=root,
            env=environment | one | {"PYTHONPATH": root},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def start(self, name: str, role: str, job: dict[str, Any]) -> int:
        """Start one process and return its pid. A name may be used again once its process has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        future = self._started[name] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(json.dumps({"name": name, "role": role, "job": job}).encode() + b"\n")
        await self._process.stdin.drain()
        async with asyncio.timeout(_START_S):
            return await future

    def send(self, name: str, number: int) -> bool:
        """Send a signal; False when it has ended already."""
        pid = self.pids.get(name)
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    async def close(self) -> None:
        """End all of them."""
        if self._process is not None and self._reader is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self._process.wait()
            await self._reader

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            told = json.loads(line)
            name, pid = told["name"], told["pid"]
            if "status" in told:
                del self.pids[name]
                self.ended.put_nowait((name, pid, told["status"]))
            else:
                self.pids[name] = pid
                self._started.pop(name).set_result(pid)


def _serve(folder: Path) -> None:
    from tests.chaos import roles  # all that the children need is imported before the first is forked

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a child's waits until its role can leave
    names: dict[int, str] = {}
    selector, rest = selectors.DefaultSelector(), b""
    selector.register(0, selectors.EVENT_READ)
    while True:
        if selector.select(_LOOK_S):
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                wanted = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _live(roles.ROLES[wanted["role"]], wanted, folder)
                names[pid] = wanted["name"]
                _tell(name=wanted["name"], pid=pid)
        _bury(names)
    for pid in names:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _bury(names: dict[int, str]) -> None:
    for pid in list(names):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _tell(name=names.pop(pid), pid=pid, status=os.waitstatus_to_exitcode(status))


def _tell(**facts: object) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def _live(role: Any, wanted: dict[str, Any], folder: Path) -> None:
    """The child: its output goes to a file; it never returns."""
    code = 1
    try:
        handle = os.open(folder / f"{wanted['name']}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        role(wanted["job"])
        code = 0
    except BaseException:  # whatever it is, it is the end of this process, and must be seen
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
