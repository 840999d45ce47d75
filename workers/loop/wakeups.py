"""One blocking read for every wake-up of a worker: work in its queue, cancels, a new plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.foreign import Finding, finding, text
from l4queue.protocol.keys import SOLO_STAGE, Keys, private_queue
from l4queue.protocol.reads import Reads

__all__ = ("WakeupListener",)


class WakeupListener:
    """Reads wake-up, control and plan streams. Reading is harmless to repeat: nothing is handed over here.

    `on_wake` is told whether it was this worker's own queue, `on_other` hears of the queues of other stages.
    """

    def __init__(
        self,
        *,
        executor: AsyncExecutor,
        keys: Keys,
        worker_id: str,
        on_wake: Callable[[bool], None],
        on_other: Callable[[], None],
        on_cancel: Callable[[Sequence[str]], None],
        on_message: Callable[[str], None],
        on_plan: Callable[[str], None],
    ) -> None:
        self._executor = executor
        self._keys = keys
        self._personal = keys.wake(private_queue(worker_id))
        self._on_wake = on_wake
        self._on_other = on_other
        self._on_cancel = on_cancel
        self._on_message = on_message
        self._on_plan = on_plan
        self._last: dict[str, str] = {}

    async def run(self, streams: Callable[[], tuple[str, Sequence[str], str]]) -> None:
        """Listen for ever; `streams` gives stage, other stages to hear of, and incarnation as they are now."""
        start_id = f"{await self._executor.run(Reads(self._keys).server_time_ms()) - 1}-0"
        while True:
            stage, others, incarnation = streams()
            control = self._keys.control(incarnation)
            wakes = (self._keys.wake(stage), self._keys.wake(SOLO_STAGE), self._personal)
            other = {self._keys.wake(name) for name in others}
            names = (*wakes, *sorted(other), self._keys.plans, control)
            if set(names) != set(self._last):
                self._last = {name: self._last.get(name, start_id) for name in names}
                self._on_wake(True)
            found = await self._executor.wait(self._last, block_s=1.0)
            for name, entries in found.items():
                self._last[name] = entries[-1][0].decode()
                if name == control:
                    self._on_cancel([text(values[b"i"]) for _, values in entries if b"i" in values])
                    await self._executor.bury([self._hear(control, values) for _, values in entries])
                elif name == self._keys.plans:
                    self._on_plan(text(entries[-1][1].get(b"body", b"")))
                elif name in other:
                    self._on_other()
                else:
                    self._on_wake(name == self._personal)

    def _hear(self, control: str, values: Mapping[bytes, bytes]) -> Finding | None:
        """Heed the message of an entry, if it has one; what cannot be read of it."""
        if b"m" in values:
            try:
                self._on_message(values[b"m"].decode())
            except ValueError as error:
                return finding(control, error, values[b"m"])
        return None if b"i" in values or b"m" in values else finding(control, "neither i nor m", repr(values))
