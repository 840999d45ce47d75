"""The guard of an engine's processes: they die with their worker, however it dies.

vLLM's engine core is a child process that outlives a worker killed with SIGKILL. Unguarded, it would go on
computing and keep the GPU's memory from the worker's successor.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from typing import IO, NoReturn

import psutil

from l4queue.failure import EXIT_FAILED

__all__ = ("end_process", "guard_descendants")

_GUARD = """
import os, signal, sys
group = int(sys.argv[1])
farewell = sys.stdin.buffer.read()  # ends when the worker's end of the pipe closes, that is, with the worker
if not farewell:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def guard_descendants() -> None:
    """Make this process the leader of its own group, and have a small process kill that group once it is gone.

    Nothing is killed when the interpreter ends in good order.

    Call it once, before any child is started. The guard lives in a session of its own, so that no signal to
    the worker's group or terminal reaches it.
    """
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _GUARD, str(os.getpgrp())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert guard.stdin is not None
    # Registered first, hence called last: a worker that ends in good order has ended its engine before.
    atexit.register(_say_farewell, guard.stdin)


def end_process(exit_code: int = EXIT_FAILED) -> NoReturn:
    """End this process and its children at once: an engine's children would otherwise keep the GPU."""
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(exit_code)


def _say_farewell(pipe: IO[bytes]) -> None:
    pipe.write(b"bye")
    pipe.close()
