"""An orderly end of a long command: the first signal cancels it, the next one does not wait for its deployment."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ("Ending", "ending_well")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ending:
    """Whether a signal has come, and which was the first."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 for Ctrl-C, 143 for SIGTERM; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal


@asynccontextmanager
async def ending_well(*, note: Callable[[], None], kill: Callable[[], None]) -> AsyncIterator[Ending]:
    """The first of SIGINT, SIGTERM and SIGHUP calls `note` and cancels this task; each further one calls `kill`.

    Inside, the task sees CancelledError, and so its deployment stops in order; it goes no further. No signal
    raises KeyboardInterrupt, which could come between the start of a child and the wait for it. A signal that is
    ignored, as Ctrl-C is by a shell's background jobs, stays so.
    """
    loop, task, ending = asyncio.get_running_loop(), asyncio.current_task(), Ending()
    assert task is not None

    def on_signal(number: signal.Signals) -> None:
        if ending.signal is not None:
            kill()
            return
        ending.signal = number
        note()
        task.cancel()

    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heard:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield ending
    except asyncio.CancelledError:
        if ending.signal is None:
            raise
        task.uncancel()
    finally:
        for number in heard:
            loop.remove_signal_handler(number)
            if ending.signal is not None:
                signal.signal(number, signal.SIG_IGN)  # all has ended: one more would only change the exit code
