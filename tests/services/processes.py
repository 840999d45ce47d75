"""Real processes for tests: started with settings of their own, their output kept, none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from l4queue.models import Plan
from l4queue.observe.overview import Overview

__all__ = ("Processes", "serve_by", "until")

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, *, timeout_s: float = 300) -> T:
    """Poll until the condition is true and return what it gave; AssertionError after the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what} (last: {found!r})"
        time.sleep(0.05)


def serve_by(plan: Plan, overview: Overview) -> bool:
    """Whether each worker of the plan publishes its stage there, or a newer plan is in force."""
    stages = {worker.worker_id: worker.stage for worker in overview.workers}
    planned = {name: stage for stage, one in enumerate(plan.stages) for name in one.worker_ids}
    return overview.plan_version > plan.version or planned.items() <= stages.items()


class Processes:
    """The processes of one deployment under test."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("L4_", "FLOWER_", "OTEL_"))}
        self.environment |= {f"L4_{name.upper()}": str(value) for name, value in settings.items()}
        self.environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, **settings: object) -> subprocess.Popen[bytes]:
        """Start `python <arguments>`; `settings` are added to those of the deployment."""
        more = {f"L4_{key.upper()}": str(value) for key, value in settings.items()}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                (sys.executable, *arguments),
                cwd=self.folder,
                env=self.environment | more,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._running[name] = process
        return process

    def worker(self, name: str, **settings: object) -> subprocess.Popen[bytes]:
        """Start a GPU worker of this id."""
        return self.start(name, "-m", "workers", worker_id=name, **settings)

    def run(self, *arguments: str, timeout_s: float = 300) -> str:
        """Run `python <arguments>` to its end and return its output."""
        done = subprocess.run(
            (sys.executable, *arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return done.stdout + done.stderr

    def log(self, name: str) -> str:
        """What a process has written so far."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def send(self, name: str, number: int) -> None:
        """Send a signal and go on."""
        self._running[name].send_signal(number)

    def stop(self, name: str, number: int = signal.SIGTERM, *, timeout_s: float = 300) -> int:
        """Send a signal and return the exit code; the process must end by itself in time."""
        process = self._running[name]
        process.send_signal(number)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end within {timeout_s} s:\n{self.log(name)[-3000:]}") from None

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._running.values():
            if process.poll() is None:
                process.kill()
            process.wait()
