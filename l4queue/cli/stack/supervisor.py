"""Supervision of child processes: start, health, restart with backoff, orderly stop. Knows nothing of l4queue."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from l4queue.cli.stack.logs import LineSplitter, Log
from l4queue.cli.stack.process import die_with_parent
from l4queue.errors import ConfigError, ServiceUnavailable
from l4queue.failure import ERROR_PREFIX

__all__ = ("Child", "ChildSpec", "ChildState", "RestartPolicy", "Supervisor")

_NUM_LAST_LINES = 20  # shown of a process that failed: a traceback's end
_READ_BYTES = 65_536  # the size of a pipe on Linux
_NUM_SHOWN_LINES = 5
"""Lines that are repeated when a child ends by itself; all of them when it is given up."""
_GONE_S = 10.0  # after a SIGKILL
_FIRST_CALL_S, _LATER_CALLS_S = 5.0, 60.0  # pauses between notes of a wait; chosen: they double, not to flood


class ChildState(StrEnum):
    """Where a child is."""

    IDLE = "idle"  # not started yet, or stopped
    STARTING = "starting"  # runs, and has not said that it is ready
    READY = "ready"
    WAITING = "waiting"  # ended; waits for its next start
    FAILED = "failed"  # ended too often before it was ever ready; is not started again


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Pauses before restarts: `first_s` doubling to `most_s`; from the start again after `healthy_s` of life.

    A child that ends `max_failures` times before it was ever ready has failed: its command line or
    configuration is wrong, and trying for ever would hide that.
    """

    first_s: float = 0.5
    most_s: float = 30.0
    healthy_s: float = 60.0
    max_failures: int = 3

    def pause_s(self, num_restarts: int) -> float:
        """Pause before the next restart after this many in a row."""
        return min(self.most_s, self.first_s * 2.0 ** min(num_restarts, 30))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """A child process to run. It is ready when it has printed `ready_text` and `is_ready` (polled) is true.

    With neither of them it is ready when it has lived for `settle_s`. `explain` finds the reason of an
    end in the last lines, where it can.

    Children stop in ascending `stop_order`, those of one order together: SIGTERM, then SIGKILL after
    `stop_s`. Children with `essential` False may fail without failing the supervisor. One that ends with an
    exit code of `final_codes` has failed at once: the next start would end the same way.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    is_ready: Callable[[], Awaitable[bool]] | None = None
    ready_text: str | None = None
    settle_s: float = 3.0
    stop_order: int = 0
    stop_s: float = 10.0
    essential: bool = True
    final_codes: frozenset[int] = frozenset()
    dies_gently: bool = False
    pass_fds: tuple[int, ...] = ()
    explain: Callable[[Iterable[str]], str | None] | None = None


class Child:
    """One supervised process and its restarts."""

    def __init__(self, spec: ChildSpec, *, log: Log, restart: RestartPolicy, changed: asyncio.Event) -> None:
        self.spec = spec
        self.state = ChildState.IDLE
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self._log = log
        self._restart = restart
        self._changed = changed
        self._was_ready = False
        self._stopping = asyncio.Event()
        self._spoken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_final(self) -> bool:
        """Whether its last end forbids another start."""
        return self.exit_code in self.spec.final_codes

    @property
    def last_words(self) -> str:
        """Its error, where its last lines have one, else those lines."""
        lines = list(self.last_lines)
        for index in reversed(range(len(lines))):
            if lines[index].startswith(ERROR_PREFIX):
                return "\n".join(lines[index:]).removeprefix(ERROR_PREFIX)
        return "\n".join(f"    {line}" for line in lines)

    def start(self) -> None:
        """Begin to keep it running."""
        if self._task is None:
            self._stopping.clear()
            self._task = asyncio.create_task(self._keep_running(), name=f"keep-{self.spec.name}")

    async def stop(self) -> None:
        """SIGTERM, after `stop_s` SIGKILL; returns when it is gone. Safe before `start` and twice."""
        self._stopping.set()
        if self._task is None:
            return
        self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait({self._task}, timeout=self.spec.stop_s)
        if not done:
            self._say(f"did not stop within {self.spec.stop_s:g} s and is killed")
            self.kill()
            done, _ = await asyncio.wait({self._task}, timeout=_GONE_S)
        if not done:  # its end has got lost: nothing is to wait for it for ever
            self._task.cancel()
        self._task = None
        self._become(ChildState.IDLE)

    def kill(self) -> None:
        """SIGKILL to it and everything it started."""
        self._signal(signal.SIGKILL)

    def end(self) -> None:
        """SIGKILL, and it is not started again."""
        self._stopping.set()
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is None:
            return
        try:
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)  # it leads a process group of its own
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            return

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        num_restarts = num_failures = 0
        while not self._stopping.is_set():
            started_s = loop.time()
            await self._run_once()
            if self._stopping.is_set():
                return
            if loop.time() - started_s >= self._restart.healthy_s:
                num_restarts = 0
            if self.is_final:
                self._say(f"{self._ending()} and is not started again")
                self._become(ChildState.FAILED)
                return
            num_failures += 1
            if not self._was_ready and num_failures >= self._restart.max_failures:
                self._say(f"ended {num_failures} times before it was ready; giving up")
                self._become(ChildState.FAILED)
                return
            pause_s = self._restart.pause_s(num_restarts)
            num_restarts += 1
            self._say(f"{self._ending()}; starts again in {pause_s:g} s")
            if (why := self.why()) is not None:
                self._log.write("l4queue", why)
            else:
                self._show_last_lines()
            self._become(ChildState.WAITING)
            await _until(self._stopping, pause_s)

    async def _run_once(self) -> None:
        # A pipe of our own: with asyncio's, Python before 3.13 notices the end of a child only when
        # everything that the child had started has closed the pipe too.
        reading_end, writing_end = os.pipe()
        reading = asyncio.create_task(self._read(reading_end))
        try:
            process = await self._spawn(writing_end)
        except OSError as error:
            self.exit_code = 127
            self._record(f"cannot be started: {error}")
            return
        finally:
            os.close(writing_end)
        self.last_lines.clear()
        self.pid, self.exit_code = process.pid, None
        self._spoken.clear()
        self._become(ChildState.STARTING)
        if self._stopping.is_set():  # stop() came while it was being started
            self._signal(signal.SIGTERM)
        watching = asyncio.create_task(self._watch_health())
        try:
            self.exit_code = await process.wait()
        finally:
            self.kill()  # what it started must not live on with nobody to watch it
            self.pid = None
            watching.cancel()
            await asyncio.wait({reading}, timeout=2.0)
            reading.cancel()
            await asyncio.gather(reading, watching, return_exceptions=True)

    async def _spawn(self, output: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.spec.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **self.spec.env},
            start_new_session=True,  # Ctrl-C of the terminal is ours to pass on
            pass_fds=self.spec.pass_fds,
            preexec_fn=die_with_parent(gentle=self.spec.dies_gently),
        )

    async def _read(self, descriptor: int) -> None:
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb", buffering=0)
        )
        splitter = LineSplitter()
        try:
            while data := await stream.read(_READ_BYTES):
                for line in splitter.feed(data):
                    self._record(line)
            for line in splitter.flush():
                self._record(line)
        finally:
            transport.close()

    async def _watch_health(self) -> None:
        pause_s = 0.05
        if self.spec.ready_text is not None:
            await self._spoken.wait()
        elif self.spec.is_ready is None:
            await asyncio.sleep(self.spec.settle_s)
        while self.spec.is_ready is not None and not await self.spec.is_ready():
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, pause_s * 1.5)
        self._was_ready = True
        self._become(ChildState.READY)

    def _record(self, line: str) -> None:
        self.last_lines.append(line)
        self._log.write(self.spec.name, line)
        if self.spec.ready_text is not None and self.spec.ready_text in line:
            self._spoken.set()

    def _say(self, text: str) -> None:
        self._log.write("l4queue", f"{self.spec.name} {text}")

    def why(self) -> str | None:
        """The reason of its last end, where it is known."""
        return None if self.spec.explain is None else self.spec.explain(self.last_lines)

    def _show_last_lines(self) -> None:
        path = self._log.path(self.spec.name)
        if self.last_lines:
            self._say(f"said last{'' if path is None else f', more in {path}'}:")
        for line in list(self.last_lines)[-_NUM_SHOWN_LINES:]:
            self._log.write("l4queue", f"    {line}")

    def _ending(self) -> str:
        if self.exit_code is not None and self.exit_code < 0:
            return f"was ended by {signal.Signals(-self.exit_code).name}"
        return f"ended with exit code {self.exit_code}"

    def _become(self, state: ChildState) -> None:
        self.state = state
        self._changed.set()


class Supervisor:
    """Children that are started in the order of `add` and stopped in their `stop_order`. One event loop."""

    def __init__(self, *, log: Log, restart: RestartPolicy | None = None) -> None:
        self.children: dict[str, Child] = {}
        self._log = log
        self._restart = restart or RestartPolicy()
        self._changed = asyncio.Event()

    def add(self, spec: ChildSpec) -> Child:
        """Start one more child."""
        if spec.name in self.children:
            raise ValueError(f"two children named {spec.name}")
        child = Child(spec, log=self._log, restart=self._restart, changed=self._changed)
        self.children[spec.name] = child
        child.start()
        return child

    async def ready(
        self,
        names: Iterable[str] | None = None,
        *,
        on_wait: Callable[[float, list[str]], None] | None = None,
        extra_s: float = 10.0,
    ) -> list[str]:
        """Wait until these children (default all) are ready; ServiceUnavailable when an essential one fails,
        ConfigError when it ended with a final code.

        Children that are not essential are waited for while an essential one is missing, and then for
        `extra_s` more; not once they have failed. `on_wait` is called with the seconds so far and the names
        still missing, after 5, 10, 20, 40 s and then every minute. Returns the names that are not ready.
        """
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        pause_s = _FIRST_CALL_S
        next_call_s = started_s + pause_s
        enough_s: float | None = None
        while True:
            self._changed.clear()
            chosen = [self.children[n] for n in (self.children if names is None else names)]
            self._raise_failed(chosen)
            missing = [c for c in chosen if c.state not in (ChildState.READY, ChildState.FAILED)]
            if any(child.spec.essential for child in missing):
                enough_s = None
            elif enough_s is None:
                enough_s = loop.time() + extra_s
            if not missing or (enough_s is not None and loop.time() >= enough_s):
                return [c.spec.name for c in chosen if c.state is not ChildState.READY]
            if on_wait and loop.time() >= next_call_s:
                next_call_s += pause_s
                pause_s = min(2.0 * pause_s, _LATER_CALLS_S)
                on_wait(loop.time() - started_s, [child.spec.name for child in missing])
            next_s = next_call_s if enough_s is None else min(next_call_s, enough_s)
            await _until(self._changed, max(0.0, next_s - loop.time()))

    async def failed(self) -> None:
        """Wait until an essential child has failed for good, then raise as `ready` does."""
        while True:
            self._changed.clear()
            self._raise_failed(list(self.children.values()))
            await self._changed.wait()

    def _raise_failed(self, children: list[Child]) -> None:
        for child in children:
            if child.state is ChildState.FAILED and child.spec.essential:
                if child.is_final:
                    raise ConfigError(f"{child.spec.name}: {child.last_words}")
                last = "\n".join(f"    {line}" for line in child.last_lines)
                why = child.why()
                raise ServiceUnavailable(
                    f"{child.spec.name} does not start (exit code {child.exit_code})"
                    f"{'' if why is None else f': {why}'}. Its last lines:\n{last}"
                )

    async def stop(self) -> None:
        """Stop all children, order by order; safe to call twice."""
        for order in sorted({child.spec.stop_order for child in self.children.values()}):
            await asyncio.gather(*(c.stop() for c in self.children.values() if c.spec.stop_order == order))

    def kill(self) -> None:
        """End everything at once; `stop` then returns quickly."""
        for child in self.children.values():
            child.end()


async def _until(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):  # no wait_for: before Python 3.12 it loses a cancel that comes with the event
        async with asyncio.timeout(timeout_s):
            await event.wait()
