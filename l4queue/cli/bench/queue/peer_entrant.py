"""A peer as an entrant: redis-server, workers and clients of its own, in the environment made for it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from l4queue.cli.bench.queue.entrant import SCRIPTS, Durability, Entrant
from l4queue.cli.bench.queue.peers import Peer
from l4queue.cli.stack.embedded import EmbeddedRedis
from l4queue.cli.stack.logs import FileLog
from l4queue.cli.stack.supervisor import ChildSpec, Supervisor
from l4queue.redis_url import SecretUrl

__all__ = ("PeerEntrant",)

_ANY_CODE = frozenset(range(256))  # a worker that ends by itself ends the run

_SETTLE_S = 0.3  # a worker that lives for so long is started; the first job then shows whether it serves


class PeerEntrant(Entrant):
    """The same redis-server as l4queue's, with the same settings; as many workers and clients."""

    def __init__(
        self,
        peer: Peer,
        environment: Path,
        *,
        durability: Durability,
        num_clients: int,
        num_workers: int,
        folder: Path,
    ) -> None:
        super().__init__(peer.name, durability=durability, num_clients=num_clients, folder=folder)
        self._peer = peer
        self._environment = environment
        self._num_workers = num_workers
        self._redis = EmbeddedRedis(folder / "redis", durability=durability, port=0)
        self._log = FileLog(folder / "logs", notes=None)
        self._supervisor = Supervisor(log=self._log)

    @property
    def redis_url(self) -> SecretUrl:
        """Of the server started for it."""
        return self._redis.url

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its processes."""
        more = {"BENCH_MODULES": str(self._environment)} if self._peer.is_node else {"PYTHONPATH": str(SCRIPTS)}
        return {**super().environment, **more}

    @property
    def client_argv(self) -> tuple[str, ...]:
        """In its environment."""
        return self._argv(self._peer.client)

    @property
    def server_pids(self) -> dict[str, list[int]]:
        """Redis and workers."""
        found: dict[str, list[int]] = {}
        for name, child in self._supervisor.children.items():
            if child.pid is not None:
                found.setdefault(name.partition("-")[0], []).append(child.pid)
        return found

    def _argv(self, words: tuple[str, ...]) -> tuple[str, ...]:
        node = shutil.which("node") or "node"
        interpreter = node if self._peer.is_node else str(self._environment / "bin" / "python")
        return (interpreter, *(word.format(scripts=SCRIPTS) for word in words))

    async def start_servers(self) -> None:
        """Redis first."""
        await asyncio.to_thread(self._redis.acquire)
        self._supervisor.add(
            ChildSpec(
                name="redis",
                argv=self._redis.argv,
                is_ready=self._redis.is_ready,
                stop_order=1,
                dies_gently=True,
                pass_fds=(self._redis.lock_fd,),
            )
        )
        await self._supervisor.ready()
        for number in range(self._num_workers):
            argv = self._argv(self._peer.worker)
            self._supervisor.add(
                ChildSpec(
                    name=f"worker-{number}",
                    argv=argv,
                    env=self.environment,
                    settle_s=_SETTLE_S,
                    final_codes=_ANY_CODE,
                )
            )
        await self._supervisor.ready()

    async def stop_servers(self) -> None:
        """At once, Redis last."""
        self.kill_servers()
        await self._supervisor.stop()
        self._redis.release()
        self._log.close()

    async def failed(self) -> None:
        """Return never; ConfigError when a worker or Redis has ended."""
        await self._supervisor.failed()

    def kill_servers(self) -> None:
        """All but Redis, which ends quickly by itself."""
        for name, child in self._supervisor.children.items():
            if name != "redis":
                child.end()
