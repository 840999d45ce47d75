"""One blocking read for every wake-up of a worker: work for it, or that there is some, cancels, a new plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto

from l4queue.protocol.calls import Calls
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.foreign import UNREADABLE, Finding, finding, text
from l4queue.protocol.keys import SOLO_STAGE, Keys, private_queue
from l4queue.protocol.readiness import LeasedArrival
from l4queue.protocol.reads import Reads

__all__ = ("Wakeup", "WakeupListener")


class Wakeup(Enum):
    """Why a worker is woken."""

    STAGE = auto()  # for what has come to the queue of its stage: nobody else was
    PRIVATE = auto()  # something has come for it alone
    SOLO = auto()  # something is to be run alone by somebody
    OTHER = auto()  # something waits in another stage, where nobody is ready for it
    ANY = auto()  # something may have come, also unheard


class WakeupListener:
    """Reads wake-up, control and plan streams. Reading is harmless to repeat: what comes is leased before."""

    def __init__(
        self,
        *,
        executor: AsyncExecutor,
        keys: Keys,
        worker_id: str,
        on_wake: Callable[[Wakeup], None],
        on_lease: Callable[[LeasedArrival], None],
        on_cancel: Callable[[Sequence[str]], None],
        on_message: Callable[[str], None],
        on_plan: Callable[[str], None],
    ) -> None:
        self._executor = executor
        self._keys = keys
        self._personal = keys.wake(private_queue(worker_id))
        self._on_wake = on_wake
        self._on_lease = on_lease
        self._on_cancel = on_cancel
        self._on_message = on_message
        self._on_plan = on_plan
        self._last: dict[str, str] = {}

    async def run(self, place: Callable[[], tuple[str, str, bool]]) -> None:
        """Listen for ever; `place` gives stage, incarnation, and whether older releases serve, as they are now.

        Older releases tell arrivals to all workers of a stage.
        """
        start_id = f"{await self._executor.run(Reads(self._keys).server_time_ms()) - 1}-0"
        solo = self._keys.wake(SOLO_STAGE)
        while True:
            stage, incarnation, has_older = place()
            control, everybody = self._keys.control(incarnation), self._keys.wake(stage)
            names = (self._personal, solo, self._keys.plans, control, *([everybody] * has_older))
            if set(names) != set(self._last):
                self._last = {name: self._last.get(name, start_id) for name in names}
                self._on_wake(Wakeup.ANY)
            found = await self._executor.wait(self._last, block_s=1.0)
            for name, entries in found.items():
                self._last[name] = entries[-1][0].decode()
                if name == control:
                    self._on_cancel([text(values[b"i"]) for _, values in entries if b"i" in values])
                    await self._executor.bury([self._hear(control, values) for _, values in entries])
                elif name == self._keys.plans:
                    self._on_plan(text(entries[-1][1].get(b"body", b"")))
                elif name == everybody:
                    self._on_wake(Wakeup.ANY)
                else:
                    await self._wake([values for _, values in entries], place()[0], is_solo=name == solo)

    async def _wake(self, told: Sequence[Mapping[bytes, bytes]], stage: str, *, is_solo: bool) -> None:
        """Tell a worker of this stage what its entries say; what it is no longer the one for wakes another."""
        await self._executor.bury([self._lease(values) for values in told if b"e" in values])
        told = [values for values in told if b"e" not in values]
        stages = {text(values[b"s"]) for values in told if b"s" in values}
        why = {Wakeup.OTHER if b"t" in values else Wakeup.PRIVATE for values in told if b"s" not in values}
        if stage in stages:
            why.add(Wakeup.STAGE)
        for wakeup in {Wakeup.SOLO} if is_solo else why:
            self._on_wake(wakeup)
        for other in stages - {stage}:
            await self._executor.run(Calls(self._keys).ring(other))

    def _lease(self, values: Mapping[bytes, bytes]) -> Finding | None:
        """Hand on the request that an entry brings; what cannot be read of it."""
        try:
            self._on_lease(LeasedArrival.parse(values))
        except UNREADABLE as error:
            return finding(self._personal, error, values)
        return None

    def _hear(self, control: str, values: Mapping[bytes, bytes]) -> Finding | None:
        """Heed the message of an entry, if it has one; what cannot be read of it."""
        if b"m" in values:
            try:
                self._on_message(values[b"m"].decode())
            except ValueError as error:
                return finding(control, error, values[b"m"])
        return None if b"i" in values or b"m" in values else finding(control, "neither i nor m", repr(values))
