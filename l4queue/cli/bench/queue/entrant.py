"""Entrants: a queue with its own Redis, worker and clients as real processes, started for one round."""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from l4queue.cli.bench.queue.load_client import LoadClient
from l4queue.cli.bench.queue.raw import RawConnection
from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.errors import ConfigError
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.retention import Retention
from l4queue.redis_url import SecretUrl

__all__ = ("SCRIPTS", "Durability", "Entrant", "L4Entrant")

Durability = Literal["fast", "strict"]
_FIRST_S, _FIRST_BYTES = 60.0, 16
"""For the first request of each client, and its size: then all serve, and scripts are loaded."""
_PACK_REQUESTS, _PACK_ENTRIES = 100, 1000  # of one call, as upkeep has it
SCRIPTS = Path(__file__).with_name("entrants")


class Entrant(ABC):
    """One queue under test. `async with` starts all of its processes and stops them, Redis last."""

    def __init__(self, name: str, *, durability: Durability, num_clients: int, folder: Path) -> None:
        self.name = name
        self.durability = durability
        self.folder = folder
        self.num_clients = num_clients
        self.clients: list[LoadClient] = []
        self.redis: RawConnection | None = None

    @property
    @abstractmethod
    def redis_url(self) -> SecretUrl:
        """Of its Redis."""

    @property
    @abstractmethod
    def client_argv(self) -> tuple[str, ...]:
        """The command line of a client."""

    @property
    @abstractmethod
    def server_pids(self) -> dict[str, list[int]]:
        """Process ids of its processes but the clients: of `redis`, of `worker`, ..."""

    @abstractmethod
    async def start_servers(self) -> None:
        """Start all but the clients, and wait until they serve."""

    @abstractmethod
    async def stop_servers(self) -> None:
        """Stop them; safe before the start and twice."""

    @abstractmethod
    async def failed(self) -> None:
        """Wait until a server has failed for good, then raise."""

    @abstractmethod
    def kill_servers(self) -> None:
        """End them without an orderly stop."""

    @property
    def pids(self) -> dict[str, list[int]]:
        """Process ids of everything, by kind."""
        return {**self.server_pids, "client": [client.pid for client in self.clients]}

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its processes beside those of this one."""
        return {"BENCH_REDIS_URL": self.redis_url.reveal(), "PYTHONUNBUFFERED": "1"}

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a client tells of itself: versions, and whether it can be paced."""
        return self.clients[0].facts

    async def order(self, do: str, *, count: int, timeout_s: float, **more: Any) -> list[dict[str, Any]]:
        """The same order to all clients at once, `count` shared among them; an answer from each."""
        shares = [count // self.num_clients + (i < count % self.num_clients) for i in range(self.num_clients)]
        orders = [
            client.order(do=do, count=share, salt=number, timeout_s=timeout_s, **more)
            for number, (client, share) in enumerate(zip(self.clients, shares, strict=True))
            if share
        ]
        failing: asyncio.Future[Any] = asyncio.ensure_future(self.failed())
        working: asyncio.Future[Any] = asyncio.gather(*orders)
        try:
            await asyncio.wait([failing, working], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                failing.result()
            return list(await working)
        finally:
            failing.cancel()
            working.cancel()
            await asyncio.gather(failing, working, return_exceptions=True)

    async def pack(self) -> bool:
        """Have finished requests take the form in which they are kept; False where they have it already."""
        return False

    def kill(self) -> None:
        """End everything at once."""
        for client in self.clients:
            client.kill()
        self.kill_servers()

    async def __aenter__(self) -> Entrant:
        try:
            await self.start_servers()
            for number in range(self.num_clients):
                log = self.folder / f"client-{number}.log"
                self.clients.append(LoadClient(self.client_argv, env=self.environment, log=log))
            await asyncio.gather(*(client.start() for client in self.clients))
            self.redis = await RawConnection.open(self.redis_url)
            await self.order("rush", count=self.num_clients, timeout_s=_FIRST_S, bytes=_FIRST_BYTES, input="text")
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        if self.redis is not None:
            await self.redis.close()
            self.redis = None
        await asyncio.gather(*(client.stop() for client in self.clients))
        self.clients.clear()
        await self.stop_servers()


class L4Entrant(Entrant):
    """l4queue as `l4queue up` runs it: dispatcher, worker with the emulated engine at no model time, planner."""

    def __init__(
        self, name: str, *, durability: Durability, num_clients: int, num_workers: int, folder: Path
    ) -> None:
        super().__init__(name, durability=durability, num_clients=num_clients, folder=folder)
        options = StackOptions(
            workers=num_workers,
            engine="emulated",
            model="tiny",
            flower=False,
            durability=durability,
            redis_port=0,
            data_dir=folder,
            quiet=True,
        )
        self._stack = Stack(options)
        if "redis_url" in self._stack.settings.model_fields_set:
            raise ConfigError("the file .env here names a Redis, which is none to flood: run this elsewhere")

    @property
    def redis_url(self) -> SecretUrl:
        """Of the Redis that the deployment has started."""
        return self._stack.redis_url

    @property
    def client_argv(self) -> tuple[str, ...]:
        """The client runs under this interpreter."""
        return (sys.executable, str(SCRIPTS / "on_l4queue.py"))

    @property
    def server_pids(self) -> dict[str, list[int]]:
        """By role: `planner` is that of Celery and its beat."""
        found: dict[str, list[int]] = {}
        for name, child in self._stack.supervisor.children.items():
            kind = name.partition("-")[0]
            if child.pid is not None:
                found.setdefault("planner" if kind == "beat" else kind, []).append(child.pid)
        return found

    async def start_servers(self) -> None:
        """All of the deployment."""
        await self._stack.__aenter__()
        await self._stack.ready()

    async def stop_servers(self) -> None:
        """At once: its data is thrown away, so nothing needs to drain."""
        self._stack.kill()
        await self._stack.stop()

    async def pack(self) -> bool:
        """What upkeep does 15 s after the end of each, now."""
        executor, retention = AsyncExecutor(self.redis_url), Retention(Keys(self._stack.settings.namespace))
        call = retention.pack(min_age_ms=0, max_requests=_PACK_REQUESTS, max_entries=_PACK_ENTRIES)
        while (await executor.run(call)).has_more:
            pass
        await executor.close()
        return True

    async def failed(self) -> None:
        """As `l4queue up` has it."""
        await self._stack.supervisor.failed()

    def kill_servers(self) -> None:
        """All but Redis, which ends quickly by itself."""
        self._stack.kill()
