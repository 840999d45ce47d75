"""The supervisor with real child processes: health, restarts, stops, and no survivors."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cli.stack.supervisor import ChildSpec, ChildState, RestartPolicy, Supervisor
from l4queue.errors import ConfigError, ServiceUnavailable

ENDLESS = "import signal; print('up', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\n"
STUBBORN += "while 1: signal.pause()"
QUICK = RestartPolicy(first_s=0.01, most_s=0.04, healthy_s=60.0, max_failures=3)


class Lines:
    """A log that keeps its lines and lets a test wait for one."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self._arrived = asyncio.Event()

    def write(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        self._arrived.set()

    def path(self, name: str) -> Path | None:
        return None

    def close(self) -> None:
        return

    def of(self, name: str) -> list[str]:
        return [line for writer, line in self.lines if writer == name]

    async def until(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            self._arrived.clear()
            await self._arrived.wait()


@asynccontextmanager
async def supervised(*, restart: RestartPolicy = QUICK) -> AsyncIterator[tuple[Supervisor, Lines]]:
    log = Lines()
    supervisor = Supervisor(log=log, restart=restart)
    try:
        yield supervisor, log
    finally:
        supervisor.kill()
        await supervisor.stop()


def python(name: str, program: str, **more: object) -> ChildSpec:
    return ChildSpec(name=name, argv=(sys.executable, "-S", "-c", program), **more)  # type: ignore[arg-type]


@given(st.integers(0, 2000))
def test_pauses_double_up_to_a_limit(num_restarts: int) -> None:
    """And never overflow."""
    policy = RestartPolicy(first_s=0.5, most_s=30.0)

    assert policy.pause_s(num_restarts) == min(30, 2**num_restarts / 2 if num_restarts < 9 else 30)


async def test_a_final_exit_code_is_not_retried_and_tells_why() -> None:
    """The error of a child that cannot be set up is ours, in full; other codes are tried again."""
    wrong = "import sys; print('error: the model holds 8192 tokens', file=sys.stderr); sys.exit(78)"
    async with supervised() as (supervisor, log):
        child = supervisor.add(python("one", wrong, final_codes=frozenset({78})))
        with pytest.raises(ConfigError, match=r"^one: the model holds 8192 tokens$"):
            await supervisor.ready()
        assert child.state is ChildState.FAILED
        assert len(log.of("one")) == 1
        with pytest.raises(ConfigError):
            await supervisor.failed()
        assert log.of("l4queue") == ["one ended with exit code 78 and is not started again"]

        supervisor.add(python("two", wrong.replace("78", "1"), final_codes=frozenset({78})))
        with pytest.raises(ServiceUnavailable):
            await supervisor.ready(["two"])
        assert len(log.of("two")) == QUICK.max_failures


async def test_a_child_is_ready_when_it_has_said_so_and_its_lines_are_logged() -> None:
    """Standard output and standard error alike."""
    program = (
        "import sys, signal; print('loading', file=sys.stderr); print('ready: now', flush=True); signal.pause()"
    )
    async with supervised() as (supervisor, log):
        child = supervisor.add(python("one", program, ready_text="ready:"))
        assert child.state is not ChildState.READY

        await supervisor.ready()

        assert child.state is ChildState.READY
        assert set(log.of("one")) == {"loading", "ready: now"}


async def test_readiness_is_polled_until_true() -> None:
    """A probe that says no is asked again."""
    answers = iter([False, False, True])

    async def probe() -> bool:
        return next(answers)

    async with supervised() as (supervisor, _):
        supervisor.add(python("one", ENDLESS, is_ready=probe))

        await supervisor.ready()

        assert next(answers, "asked three times") == "asked three times"


async def test_a_probe_that_is_true_too_early_is_not_asked_before_the_child_has_spoken() -> None:
    """At each start: what the probe looks at may be left of the process before."""
    program = (
        "import signal; signal.signal(signal.SIGUSR1, lambda *_: print('up', flush=True)); "
        "print('loading', flush=True); [signal.pause() for _ in iter(int, 1)]"
    )
    asked = 0

    async def probe() -> bool:
        nonlocal asked
        asked += 1
        return True

    async with supervised() as (supervisor, log):
        child = supervisor.add(python("one", program, ready_text="up", is_ready=probe))
        for start in (1, 2):
            await log.until(lambda start=start: log.of("one").count("loading") == start)
            assert child.state is ChildState.STARTING
            assert asked == start - 1

            assert child.pid is not None
            os.kill(child.pid, signal.SIGUSR1)
            await supervisor.ready()
            assert asked == start
            os.kill(child.pid, signal.SIGKILL)


async def test_a_killed_child_starts_again() -> None:
    """With another process id, and the log says why."""
    async with supervised() as (supervisor, log):
        child = supervisor.add(python("one", ENDLESS, ready_text="up"))
        await supervisor.ready()
        first = child.pid
        assert first is not None

        os.kill(first, signal.SIGKILL)
        await log.until(lambda: len(log.of("one")) == 2)

        assert child.pid != first
        assert log.of("l4queue") == [
            "one was ended by SIGKILL; starts again in 0.01 s", "one said last:", "    up"
        ]  # fmt: skip


async def test_a_child_that_is_killed_at_the_end_does_not_start_again() -> None:
    """Whoever does not want to wait any longer is not told of a restart."""
    async with supervised() as (supervisor, log):
        supervisor.add(python("one", ENDLESS, ready_text="up"))
        await supervisor.ready()

        supervisor.kill()
        await supervisor.stop()

        assert log.of("one") == ["up"]
        assert log.of("l4queue") == []


async def test_the_reason_of_an_end_is_told_where_its_last_lines_have_it() -> None:
    """While it is started again, and when it is given up."""

    def explain(lines: Iterable[str]) -> str | None:
        return "the disk is full" if any("No space left" in line for line in lines) else None

    async with supervised() as (supervisor, log):
        supervisor.add(python("one", "print('No space left on device'); exit(1)", explain=explain))
        with pytest.raises(
            ServiceUnavailable, match=r"one does not start \(exit code 1\): the disk is full\. Its"
        ):
            await supervisor.ready()
        assert log.of("l4queue")[1] == "the disk is full"
        assert not any("said last" in line for line in log.of("l4queue"))  # at each of many starts


def pauses(log: Lines) -> list[str]:
    """What is said of each restart."""
    return [line.rpartition(" in ")[2] for line in log.of("l4queue") if "starts again in" in line]


async def test_pauses_grow_while_a_child_keeps_dying() -> None:
    """A child that was ready once is tried for ever."""
    async with supervised() as (supervisor, log):
        supervisor.add(python("one", "print('up'); raise SystemExit(3)", ready_text="up"))

        await log.until(lambda: len(pauses(log)) >= 5)

        assert pauses(log)[:5] == ["0.01 s", "0.02 s", "0.04 s", "0.04 s", "0.04 s"]


async def test_a_healthy_life_resets_the_pause() -> None:
    """Here every life counts as healthy."""
    async with supervised(restart=RestartPolicy(first_s=0.01, healthy_s=0.0)) as (supervisor, log):
        supervisor.add(python("one", "print('up')", ready_text="up"))

        await log.until(lambda: len(pauses(log)) >= 4)

        assert set(pauses(log)) == {"0.01 s"}


async def test_a_child_that_never_becomes_ready_fails_with_its_last_lines() -> None:
    """After three tries; the error carries what it said."""
    async with supervised() as (supervisor, log):
        supervisor.add(python("one", "print('no model here'); raise SystemExit(7)", ready_text="never"))

        with pytest.raises(ServiceUnavailable, match=r"one does not start \(exit code 7\)[^\0]*no model here"):
            await supervisor.ready()

        assert log.of("one") == ["no model here"] * 3
        with pytest.raises(ServiceUnavailable):
            await supervisor.failed()


async def test_a_command_that_does_not_exist_fails_likewise() -> None:
    """And names what could not be run."""
    async with supervised() as (supervisor, _):
        supervisor.add(ChildSpec(name="one", argv=("/nonexistent/program",)))

        with pytest.raises(ServiceUnavailable, match=r"/nonexistent/program"):
            await supervisor.ready()


async def test_a_child_that_is_not_essential_may_fail() -> None:
    """Flower is such a child."""
    async with supervised() as (supervisor, _):
        supervisor.add(python("two", ENDLESS, ready_text="up"))
        child = supervisor.add(python("one", "raise SystemExit(7)", ready_text="never", essential=False))

        assert await supervisor.ready(extra_s=3600.0) == ["one"]

        assert child.state is ChildState.FAILED


async def test_a_child_that_is_not_essential_holds_nothing_up() -> None:
    """Flower at an address that nobody can ask: it lives, and is never ready."""

    async def never() -> bool:
        return False

    async with supervised() as (supervisor, _):
        supervisor.add(python("two", ENDLESS, ready_text="up"))
        child = supervisor.add(python("one", ENDLESS, is_ready=never, settle_s=0.0, essential=False))

        assert await supervisor.ready(extra_s=0.0) == ["one"]
        assert child.state in (ChildState.IDLE, ChildState.STARTING)


async def test_a_child_without_a_sign_of_readiness_is_ready_once_it_has_lived_a_while() -> None:
    """Celery's beat is such a child."""
    async with supervised() as (supervisor, _):
        child = supervisor.add(python("one", ENDLESS, settle_s=0.01))

        await supervisor.ready()

        assert child.state is ChildState.READY


async def test_children_stop_order_by_order() -> None:
    """Workers drain while Redis is still there."""
    program = (
        "import signal, sys\n"
        "def end(*_): print('ended', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True)\n"
        "while 1: signal.pause()"
    )
    async with supervised() as (supervisor, log):
        for name, order in (("redis", 2), ("worker", 0), ("dispatcher", 1)):
            supervisor.add(python(name, program, ready_text="up", stop_order=order))
        await supervisor.ready()

        await supervisor.stop()
        await supervisor.stop()

        assert [name for name, line in log.lines if line == "ended"] == ["worker", "dispatcher", "redis"]
        assert all(child.state is ChildState.IDLE for child in supervisor.children.values())


async def test_a_child_that_ignores_sigterm_is_killed() -> None:
    """After its deadline, and the log says so."""
    async with supervised() as (supervisor, log):
        child = supervisor.add(python("one", STUBBORN, ready_text="up", stop_s=0.2))
        await supervisor.ready()

        await supervisor.stop()

        assert child.exit_code == -signal.SIGKILL
        assert log.of("l4queue") == ["one did not stop within 0.2 s and is killed"]


async def test_kill_ends_a_stop_in_progress() -> None:
    """The second Ctrl-C."""
    async with supervised() as (supervisor, _):
        child = supervisor.add(python("one", STUBBORN, ready_text="up", stop_s=3600.0))
        await supervisor.ready()
        stopping = asyncio.create_task(supervisor.stop())
        await asyncio.sleep(0)

        supervisor.kill()
        await stopping

        assert child.exit_code == -signal.SIGKILL


async def test_what_a_dead_child_had_started_is_ended_too() -> None:
    """A worker's engine process must not keep the GPU."""
    program = (
        "import subprocess, sys, signal\n"
        f"p = subprocess.Popen([sys.executable, '-S', '-c', {ENDLESS!r}])\n"
        "print('child', p.pid, flush=True); signal.pause()"
    )
    async with supervised() as (supervisor, log):
        child = supervisor.add(python("one", program, ready_text="child"))
        await supervisor.ready()
        grandchild = psutil.Process(int(log.of("one")[0].split()[1]))
        assert child.pid is not None

        os.kill(child.pid, signal.SIGKILL)
        await log.until(lambda: bool(log.of("l4queue")))

        assert await asyncio.to_thread(psutil.wait_procs, [grandchild], timeout=20) == ([grandchild], [])


@pytest.mark.parametrize("name", ["", "gentle"])
def test_children_do_not_outlive_a_killed_supervisor(name: str, tmp_path: Path) -> None:
    """SIGKILL leaves no chance to clean up; the kernel does it."""
    program = f"""
import asyncio, sys
from l4queue.cli.stack.logs import FileLog
from l4queue.cli.stack.supervisor import ChildSpec, Supervisor
from pathlib import Path
async def main():
    supervisor = Supervisor(log=FileLog(Path({str(tmp_path)!r})))
    argv = (sys.executable, "-S", "-c", {ENDLESS!r})
    child = supervisor.add(ChildSpec(name="one", argv=argv, ready_text="up", dies_gently={bool(name)}))
    await supervisor.ready()
    print(child.pid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))

        parent.kill()

    gone, alive = psutil.wait_procs([child], timeout=120)
    assert (gone, alive) == ([child], [])
