"""A deployment in real processes under fire: who runs, where faults strike, when it is over."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from l4queue.protocol.scripts import all_scripts
from tests.chaos.faults import Fuse, Kind, Point, Side
from tests.chaos.nursery import Nursery
from tests.chaos.roles import fuse_to

__all__ = ("MOVES", "SCRIPTS", "Storm", "all_points", "open_storm", "tally")

MOVES = ("handovers", "steals_waiting", "steals_running")
# how many calls of each script a role lets pass at most before it is struck: about one to three seconds' worth
SCRIPTS: dict[str, dict[str, int]] = {
    "worker": {
        "take": 25,
        "emit": 80,
        "settle": 8,
        "release": 3,
        "renew": 6,
        "extend": 4,
        "pardon": 1,
        "ask": 2,
        "reap": 10,
        "expire": 10,
        "migrate": 1,
        "retire": 1,
        "survey": 10,
        "pack": 10,
        "evict": 10,
    },
    "dispatcher": {
        "route": 15,
        "refuse": 2,
        "reap": 10,
        "expire": 10,
        "repair": 40,
        "forget": 4,
        "migrate": 1,
        "pack": 10,
        "evict": 10,
    },
    "planner": {"publish": 3, "migrate": 3},
    "client": {"submit": 20, "follow": 20, "cancel": 2, "unfollow": 1, "mark_read": 1},
}
WORKERS = ("w0", "w1", "w2", "w3")
_TERM_S = 2.0
_BLACKOUT_S = 12.0
_STOP_S = 4.0
_CALM_S = 300.0


def all_points(kind: Kind | None = None) -> list[Point]:
    """Every cut point: each script of each role, before and after, by death and by a lost reply."""
    return [
        Point(role, script, side, each)
        for role, scripts in SCRIPTS.items()
        for script in scripts
        for side in Side
        for each in Kind
        if kind in (None, each)
    ]


def tally(journal: Path) -> Counter[Point]:
    """How often each point was struck."""
    found: Counter[Point] = Counter()
    if journal.exists():
        for line in journal.read_text().splitlines():
            role, script, side, kind = line.split()
            found[Point(role, script, Side(side), Kind(kind))] += 1
    return found


class Storm:
    """Keeps a deployment running whose processes kill themselves at chosen points, and starts them again.

    Points in `wanted` are armed first, until each was struck; then all in turn.
    """

    def __init__(
        self, nursery: Nursery, redis_url: str, *, namespace: str, folder: Path, seed: int, wanted: Iterable[Point]
    ) -> None:
        self.nursery = nursery
        self.seed = seed
        self.journal = folder / f"{namespace}.strikes"
        self.wanted = set(wanted)
        self.crashes: list[str] = []  # ends that no fault explains
        self._folder = folder
        self._namespace = namespace
        self._redis_url = redis_url
        self._rng = random.Random(seed)
        self._is_calm = self._is_quiet = False
        self._present: set[str] = set()
        self._dark_until_s = 0.0
        self._jobs: dict[str, tuple[str, dict[str, Any]]] = {}
        self._ending: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = 0
        self._dismissed: set[int] = set()

    # files ------------------------------------------------------------------------------------------
    @property
    def endings(self) -> list[dict[str, Any]]:
        """What the clients wrote down of each wish that ended."""
        rows = []
        for path in sorted(self._folder.glob(f"{self._namespace}-c*.endings")):
            rows += [json.loads(line) for line in path.read_text().splitlines()]
        return rows

    @property
    def made(self) -> list[int]:
        """Numbers of all wishes that a client may have made."""
        found: list[int] = []
        for index in range(2):
            path = self._folder / f"{self._namespace}-c{index}.made"
            if path.exists():
                found += range(index, int(path.read_text()), 2)
        return found

    # running ----------------------------------------------------------------------------------------
    async def begin(self, *, settings: dict[str, Any] | None = None, planner_s: float = 3.0) -> None:
        """Start everybody: four workers of the plans, one under ever new names, and all the others."""
        self.cast(settings=settings, planner_s=planner_s)
        for name in list(self._jobs):
            await self.launch(name)
        self._spawn(self._terminate_now_and_then())
        self._spawn(self._black_out_now_and_then())
        self._spawn(self._stop_now_and_then())

    def cast(
        self,
        *,
        settings: dict[str, Any] | None = None,
        planner_s: float = 3.0,
        most: int = 20,
        is_quiet: bool = False,
    ) -> None:
        """Say who there will be; `launch` starts one. Quiet: no faults but those that a test sends itself.

        A client has `most` wishes open at a time.
        """
        self._is_quiet = is_quiet
        common = {
            "settings": {"redis_url": self._redis_url, "namespace": self._namespace} | (settings or {}),
            "journal": str(self.journal),
            "seed": self.seed,
        }
        for name in (*WORKERS, "x"):
            self._jobs[name] = ("worker", common | {"worker_id": name})
        for name in ("d0", "d1"):
            self._jobs[name] = ("dispatcher", common | {"name": name})
        self._jobs["p0"] = ("planner", common | {"worker_ids": WORKERS, "period_s": planner_s})
        self._jobs["r0"] = ("replanner", common)
        for index in range(2):
            stem = self._folder / f"{self._namespace}-c{index}"
            files = {"endings": f"{stem}.endings", "made": f"{stem}.made"}
            pace = {"first": index, "step": 2, "most": most, "pause_s": 0.02, "burst_s": 2.5}
            self._jobs[f"c{index}"] = ("client", common | files | pace)
        if not is_quiet:
            del self._jobs["r0"]
        self._spawn(self._watch())

    async def launch(self, *names: str) -> None:
        """Start these; whoever ends is started again."""
        for name in names:
            self._present.add(name)
            await self._start(name)

    def kill(self, *names: str) -> None:
        """SIGKILL; they do not come back."""
        for name in names:
            self._present.discard(name)
            self.nursery.send(name, signal.SIGKILL)

    async def leave(self, *names: str) -> None:
        """SIGTERM, until they have ended well; they do not come back."""
        await asyncio.gather(*(self._leave(name) for name in names))

    async def until(self, is_enough: Any, *, at_least_s: float, at_most_s: float) -> float:
        """Let it go on until enough has happened; how long that took, s."""
        began_s = time.monotonic()
        while (past_s := time.monotonic() - began_s) < at_most_s:
            if past_s >= at_least_s and await is_enough():
                break
            await asyncio.sleep(0.25)
        return past_s

    async def calm(self) -> None:
        """No more faults; clients see all their wishes end, then everybody leaves in order."""
        self._is_calm = True
        for wave in ("client", "planner", "replanner", "worker", "dispatcher"):
            if wave == "dispatcher":  # workers that died in the last moment are still to be reaped
                await self._until_nobody_is_registered()
            await self.leave(*(n for n in self._present if self._jobs[n][0] == wave))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _dismiss(self, name: str) -> None:
        """SIGTERM, once to each process."""
        pid = self.nursery.pids.get(name)
        if pid is not None and pid not in self._dismissed:
            self._dismissed.add(pid)
            self.nursery.send(name, signal.SIGTERM)

    async def _until_nobody_is_registered(self) -> None:
        reads, executor = Reads(Keys(self._namespace)), AsyncExecutor(self._redis_url)
        async with asyncio.timeout(_CALM_S):
            while await executor.run(reads.incarnations()):  # noqa: ASYNC110 - nobody signals it
                await asyncio.sleep(0.1)
        await executor.close()

    async def _leave(self, name: str) -> None:
        """Repeated, should it have died of an armed fault meanwhile."""
        async with asyncio.timeout(_CALM_S):
            self._ending.add(name)
            while name in self._present:
                self._dismiss(name)
                await asyncio.sleep(0.1)
        self._ending.discard(name)

    async def _start(self, name: str) -> None:
        role, job = self._jobs[name]
        if name == "x":  # a worker that nobody knows: its own queue is orphaned with it
            self._number += 1
            job = job | {"worker_id": f"x{self._number}"}
        await self.nursery.start(name, role, job | {"fuses": [fuse_to(f) for f in self._fuses(role)]})

    def _fuses(self, role: str) -> list[Fuse]:
        """Points not struck yet, and a few others."""
        if self._is_calm or self._is_quiet:
            return []
        struck = tally(self.journal)
        new = [p for p in self.wanted if p.role == role and not struck[p]]
        lethal = any(p.kind is Kind.KILL for p in new)  # who dies of something else meets no new point
        old = [p for p in all_points(Kind.CUT if lethal else None) if p.role == role]
        points = set(new) | set(self._rng.sample(old, min(5, len(old))))
        return [Fuse(p, self._rng.randint(1, SCRIPTS[role][p.script])) for p in sorted(points)]

    async def _stop_now_and_then(self) -> None:
        """A worker stands still for two leases and comes back: it has lost them, and has not died."""
        while not self._is_calm:
            await asyncio.sleep(_STOP_S)
            name = self._rng.choice(WORKERS)
            self.nursery.send(name, signal.SIGSTOP)
            try:
                await asyncio.sleep(_STOP_S / 2)
            finally:
                self.nursery.send(name, signal.SIGCONT)

    async def _watch(self) -> None:
        while True:
            name, _, status = await self.nursery.ended.get()
            if status not in (0, -signal.SIGKILL):
                self.crashes.append(f"{name} ended with {status}")
            if status == 0 and name in self._ending:
                self._present.discard(name)
            elif name in self._present:
                self._spawn(self._again(name))

    async def _again(self, name: str) -> None:
        if not self._is_calm:  # at times it stays away for longer than a lease
            await asyncio.sleep(self._rng.choice((0.0, 0.1, 0.3, 1.5)))
            if self._jobs[name][0] == "worker":
                await asyncio.sleep(max(0.0, self._dark_until_s - time.monotonic()))
        await self._start(name)

    async def _terminate_now_and_then(self) -> None:
        """Workers are also asked to leave, in order: that is when they give back and retire."""
        while not self._is_calm:
            await asyncio.sleep(_TERM_S * self._rng.uniform(0.5, 1.5))
            self._dismiss(self._rng.choice((*WORKERS, "x")))

    async def _black_out_now_and_then(self) -> None:
        """All workers die, the later ones while they hand over to the dead: upkeep is left to the dispatchers."""
        while not self._is_calm:
            await asyncio.sleep(_BLACKOUT_S * self._rng.uniform(0.5, 1.5))
            first, second = ("w0", "w1", "x"), ("w2", "w3")
            self._dark_until_s = time.monotonic() + 3.0
            for part in (first, second):
                for name in part:
                    self.nursery.send(name, signal.SIGKILL)
                await asyncio.sleep(0.5)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def open_storm(
    redis_url: str, *, namespace: str, folder: Path, seed: int, wanted: Sequence[Point] = ()
) -> AsyncIterator[tuple[Storm, AsyncExecutor, Reads]]:
    """A storm that has not begun, and a look at its Redis; afterwards nothing is left running."""
    nursery = Nursery(folder)
    await nursery.open()
    executor = AsyncExecutor(redis_url)
    for one in all_scripts():  # a script that is missing at the first call would not have run when it is struck
        await executor.client.script_load(one.source)
    try:
        storm = Storm(nursery, redis_url, namespace=namespace, folder=folder, seed=seed, wanted=wanted)
        yield storm, executor, Reads(Keys(namespace))
    finally:
        await nursery.close()
        await executor.close()
