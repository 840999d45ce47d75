"""Client processes of an entrant, which obey orders over pipes: see `entrants/pacing.py`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from l4queue.cli.stack.process import die_with_parent
from l4queue.errors import ServiceUnavailable

__all__ = ("LoadClient",)

_MAX_ANSWER_BYTES = 1 << 26  # latencies of a round, 20 bytes each: room for millions
_STOP_S = 5.0  # to let go of its connections before it is killed
_NUM_LAST_LINES = 8  # of its log, repeated where it fails: a traceback's end


class LoadClient:
    """One client process: `order` is answered by what its work has shown."""

    def __init__(self, argv: tuple[str, ...], *, env: Mapping[str, str], log: Path) -> None:
        self._argv = argv
        self._env = dict(env)
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self.facts: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """Its process id, once started."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it is connected."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self._env},
                limit=_MAX_ANSWER_BYTES,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        self.facts = await self._answer()

    async def order(self, *, timeout_s: float, **order: Any) -> dict[str, Any]:
        """Have it do something; ServiceUnavailable when it fails or takes too long."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        try:
            async with asyncio.timeout(timeout_s):
                with suppress(ConnectionError):
                    await self._process.stdin.drain()
                return await self._answer()
        except TimeoutError:
            raise ServiceUnavailable(
                f"{self._name} has not done its {order['do']} within {timeout_s:.0f} s{self._last_lines()}"
            ) from None

    async def stop(self) -> None:
        """Let it end; killed after a while. Safe before `start` and twice."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            pass
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    @property
    def _name(self) -> str:
        return f"client {Path(self._argv[1]).stem}"

    async def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise ServiceUnavailable(f"{self._name} has ended{self._last_lines()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_lines(self) -> str:
        lines = self._log.read_text("utf-8", errors="replace").strip().splitlines()[-_NUM_LAST_LINES:]
        return "".join(f"\n    {line}" for line in lines)
