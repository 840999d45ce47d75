"""What a reader of the log sees: lines with their time, commands, checks that hold or end the run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ("Failed", "check", "execute", "heading", "say", "until")

_STARTED_S = time.monotonic()
_POLL_S = 0.5


class Failed(Exception):
    """A check did not hold, or a command failed; the run ends non-zero."""


def say(text: str) -> None:
    """One line with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED_S:7.1f} s] {text}", flush=True)


def heading(text: str) -> None:
    """The start of a chapter."""
    print(flush=True)
    say(f"=== {text}")


def check(holds: bool, what: str) -> None:
    """Say that it holds, or fail."""
    if not holds:
        raise Failed(what)
    say(f"ok    {what}")


def until(condition: Callable[[], bool], what: str, *, timeout_s: float) -> None:
    """Poll until it holds; then say how long that took."""
    started_s = time.monotonic()
    while not condition():
        if time.monotonic() - started_s > timeout_s:
            raise Failed(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(_POLL_S)
    say(f"ok    {what} (after {time.monotonic() - started_s:.1f} s)")


def execute(
    *command: str | Path,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    timeout_s: float = 1800.0,
    allowed: Sequence[int] = (0,),
) -> str:
    """Run a command and return its output; with `log`, its output goes there. Failed shows the end of it."""
    argv = [str(part) for part in command]
    try:
        done = subprocess.run(
            argv, env=environment, cwd=cwd, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(argv[:6])} … did not end within {timeout_s:.0f} s") from None
    except OSError as error:
        raise Failed(f"{argv[0]} cannot be run: {error}") from None
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}\n")
    if done.returncode not in allowed:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise Failed(f"{' '.join(argv)} ended with {done.returncode}:\n{tail}")
    return done.stdout
