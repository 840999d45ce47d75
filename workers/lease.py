"""The worker's lease: an incarnation, renewed only while its engine makes progress or is rightly idle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

from l4queue.compat import FORMAT
from l4queue.config import Settings
from l4queue.models import WorkerLoad
from l4queue.policy.cost import StepCost
from l4queue.policy.prices import MovePrice
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.door import AsyncDoor
from workers.engine import EngineDied

__all__ = ("Lease",)

log = logging.getLogger("l4queue.worker")
_NEWS_S = 0.5
_MIN_NEWS_S = 0.02


class Lease:
    """Begins, renews and ends this worker's lease. `on_lost` is called when others have taken its work."""

    def __init__(
        self,
        *,
        settings: Settings,
        door: AsyncDoor,
        calls: Calls,
        worker_id: str,
        load: Callable[[], WorkerLoad],
        cost: Callable[[], StepCost | None],
        price: Callable[[], MovePrice],
        num_steps: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._door = door
        self._calls = calls
        self._worker_id = worker_id
        self._load = load
        self._cost = cost
        self._price = price
        self._num_steps = num_steps
        self._sequence = 0
        self._seen_steps = -1
        self._progress_s = 0.0
        self._due = asyncio.Event()
        self.told: WorkerLoad | None = None  # the load that the others know
        self.histogram: Counter[str] = Counter()
        self.incarnation = self._fresh_name()

    async def begin(self) -> None:
        """Register under a new incarnation."""
        self.incarnation = self._fresh_name()
        self._progress_s = asyncio.get_running_loop().time()
        await self._send(register=True)

    async def keep(self, on_lost: Callable[[], None]) -> None:
        """Renew for ever, three times a lease or more often, since siblings decide by the load it tells.

        Raises EngineDied when the engine has stalled too long.
        """
        while True:
            await asyncio.sleep(_MIN_NEWS_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._settings.lease_s / 3, _NEWS_S) - _MIN_NEWS_S):
                    await self._due.wait()
            self._due.clear()
            self._check_progress()
            if await self._send(register=False) is Verdict.LOST:
                log.warning("lease of %s lost: its requests continue elsewhere", self.incarnation)
                on_lost()
                await self.begin()

    def tell(self) -> None:
        """Renew now: the load has changed by more than siblings should overlook."""
        self._due.set()

    async def end(self) -> None:
        """Leave; what is still held is for the reaper."""
        await self._door.run(self._calls.retire(self.incarnation))

    def _check_progress(self) -> None:
        now_s, steps = asyncio.get_running_loop().time(), self._num_steps()
        if steps != self._seen_steps or self._load().num_running == 0:
            self._seen_steps, self._progress_s = steps, now_s
        stalled_s = now_s - self._progress_s
        if stalled_s > self._settings.stall_limit_s:
            raise EngineDied(f"no engine step for {stalled_s:.0f} s with requests running")

    async def _send(self, *, register: bool) -> Verdict:
        self._sequence += 1
        sent = dict(self.histogram)
        cost = self._cost()
        load = self.told = self._load()
        told = {
            "v": FORMAT,
            "load": asdict(load),
            "cost": None if cost is None else cost.to_dict(),
            "price": asdict(self._price()),
        }
        verdict = await self._door.run(
            self._calls.renew(
                self.incarnation,
                worker_id=self._worker_id,
                lease_ms=int(self._settings.lease_s * 1000),
                load=json.dumps(told),
                sequence=self._sequence,
                register=register,
                histogram=sent,
            )
        )
        if verdict is Verdict.OK:
            self.histogram.subtract(sent)
            self.histogram += Counter()  # drops what is zero
        return verdict

    def _fresh_name(self) -> str:
        return f"{self._worker_id}:{uuid.uuid4().hex[:12]}"
