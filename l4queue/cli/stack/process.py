"""Setup of a child process between fork and exec, so that it never outlives its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

__all__ = ("die_with_parent",)

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with_parent(*, gentle: bool = False) -> Callable[[], None] | None:
    """A `preexec_fn`: on Linux the kernel ends the child when the thread that started it ends.

    With SIGTERM if `gentle`, else SIGKILL. Elsewhere None: only an orderly stop takes the children along.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: little is safe after it
    number = signal.SIGTERM if gentle else signal.SIGKILL
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it ended before prctl was called
            os._exit(1)

    return prepare
