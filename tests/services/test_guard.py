"""The guard of a worker's processes: what the engine started does not outlive a killed worker."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.services.processes import until

pytestmark = pytest.mark.services

WORKER = """
import subprocess, sys
from workers.process.guard import guard_descendants
guard_descendants()
child = "import subprocess, sys; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"
print(subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def worker() -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A guarded process with a child and a grandchild."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    family = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    yield process, family
    process.kill()
    for member in family:
        if is_alive(member):
            member.kill()
    process.communicate()  # ends when nobody holds its output any more


def is_alive(process: psutil.Process) -> bool:
    """Whether it still computes; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_children_die_with_a_killed_worker(
    worker: tuple[subprocess.Popen[str], list[psutil.Process]], number: signal.Signals
) -> None:
    """Grandchildren too."""
    process, family = worker
    assert all(is_alive(member) for member in family)
    process.send_signal(number)

    until(lambda: not any(is_alive(member) for member in family), "the family gone")


def test_a_worker_that_ends_in_good_order_kills_nobody(
    worker: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    """It has ended its engine before; whoever is left was left on purpose."""
    process, family = worker
    guards = [child for child in psutil.Process(process.pid).children() if child not in family]
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(120) == 0

    until(lambda: not any(is_alive(guard) for guard in guards), "the guard gone")
    assert all(is_alive(member) for member in family)
