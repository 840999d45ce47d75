"""CPU time of a streamed token with many streams on one client: of Redis, of the writing worker, of the client.

    python bench/streams.py [--streams 20000] [--rounds 8] [--tokens 4] [--pause 4] [--client async] [--json]

A redis-server of its own (AOF once a second). The worker is a process that writes `--tokens` tokens to every
request, `--rounds` times, a round each `--pause` seconds, by the scripts of a real one; there is no engine. The
client is one AsyncClient in this process that reads all streams and counts their tokens; `--client threads` is
one Client with a thread for each stream. The same without any reader shows what a reader costs the others.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from told import cpu_s, machine, tell

from l4queue import AsyncClient, Client, Settings
from l4queue.cli.stack.embedded import EmbeddedRedis
from l4queue.models import RequestState
from l4queue.policy.admission import unbounded_budget
from l4queue.protocol.calls import Call, Calls, Taker
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.records import Outcome

_BATCH = 64  # writes of one round trip: as many as run in one engine
_EVERYTHING = 10**12


class Worker:
    """Routes, takes and writes requests, as dispatcher and worker do."""

    def __init__(self, url: str, namespace: str) -> None:
        self._executor = Executor(url)
        self._calls = Calls(Keys(namespace))
        self._owner: dict[str, Any] = {"incarnation": "w", "epoch": 1}

    def take(self, ids: Sequence[str]) -> None:
        """All of them run."""
        more: dict[str, Any] = {"stage": "0", "score": 1.0, "token_ids": range(100), "max_tokens": 10**6}
        more |= {"entry_id": "1-1", "plan_version": 0, "bucket": 2}
        self._send([self._calls.route(i, **more) for i in ids])
        begin = self._calls.renew("w", worker_id="w", lease_ms=10**8, load="{}", sequence=1, register=True)
        self._executor.run(begin)
        taker = Taker(worker_id="w", incarnation="w", stage="0")
        for number in range(0, len(ids), 1000):
            budget = unbounded_budget(1000, reason="benchmark")
            self._executor.run(self._calls.take("0", taker=taker, nonce=str(number), budget=budget))

    def write(self, ids: Sequence[str], *, offset: int, num: int, text: str | None = None) -> None:
        """Tokens for all of them."""
        tokens, told = range(offset, offset + num), " token" * num if text is None else text
        more: dict[str, Any] = {**self._owner, "offset": offset, "token_ids": tokens, "text": told}
        self._send([self._calls.emit(i, **more) for i in ids])

    def settle(self, ids: Sequence[str], *, offset: int) -> None:
        """All of them end."""
        outcome = Outcome(state=RequestState.DONE, finish_reason="length")
        more: dict[str, Any] = {**self._owner, "offset": offset, "token_ids": (), "text": "", "outcome": outcome}
        self._send([self._calls.settle(i, **more) for i in ids])

    def _send(self, calls: Sequence[Call[Any]]) -> None:
        for begin in range(0, len(calls), _BATCH):
            self._executor.run_many(calls[begin : begin + _BATCH])


def work(pipe: Connection, url: str, given: argparse.Namespace) -> None:
    """The process of the worker: takes the ids that it is told, writes when it is told, and tells its CPU time."""
    while (order := pipe.recv()) is not None:
        namespace, ids = order
        worker = Worker(url, namespace)
        worker.take(ids)
        pipe.send("taken")
        pipe.recv()
        began_s = time.process_time()
        for turn in range(given.rounds):
            due_s = time.monotonic() + given.pause
            worker.write(ids, offset=turn * given.tokens, num=given.tokens)
            time.sleep(max(0.0, due_s - time.monotonic()))
        worker.settle(ids, offset=given.rounds * given.tokens)
        pipe.send(time.process_time() - began_s)


class Run:
    """One measurement: requests of a namespace of their own, and who reads them."""

    def __init__(self, redis: EmbeddedRedis, pipe: Connection, given: argparse.Namespace, *, readers: str) -> None:
        assert redis.pid is not None
        self.redis = psutil.Process(redis.pid)
        self.pipe = pipe
        self.given = given
        self.readers = readers
        self.settings = Settings(
            redis_url=redis.url,
            namespace=readers,
            max_backlog_tokens=_EVERYTHING,
            max_backlog_bytes=_EVERYTHING,
        )
        self.num_read = 0
        self._lock = threading.Lock()

    async def measure(self) -> dict[str, float]:
        """CPU time of each side, microseconds per token."""
        async with AsyncClient(settings=self.settings) as client:
            with Client(settings=self.settings) as blocking:
                return await self._measure(client, blocking)

    async def _measure(self, client: AsyncClient, blocking: Client) -> dict[str, float]:
        requests = ["hello"] * self.given.streams
        reading: list[asyncio.Task[None]] = []
        threads: list[threading.Thread] = []
        own = await client.enqueue_many(requests, max_tokens=1) if self.readers != "threads" else []
        others = blocking.enqueue_many(requests, max_tokens=1) if self.readers == "threads" else []
        ids = [handle.id for handle in (*own, *others)]
        self.pipe.send((self.readers, ids))
        await asyncio.to_thread(self.pipe.recv)
        began = time.process_time(), time.monotonic()
        if self.readers == "async":
            reading = [asyncio.create_task(self.read(handle)) for handle in own]
        for handle in others:
            threads.append(threading.Thread(target=self.read_here, args=(handle,)))
            threads[-1].start()
        await self.are_followed(ids)
        open_us, open_s = (time.process_time() - began[0]) / len(ids) * 1e6, time.monotonic() - began[1]
        spent = time.process_time(), cpu_s(self.redis), time.monotonic()
        self.pipe.send("go")
        worker_s = await asyncio.to_thread(self.pipe.recv)
        await asyncio.gather(*reading)
        for thread in threads:
            await asyncio.to_thread(thread.join)
        tokens = len(ids) * self.given.rounds * self.given.tokens
        assert self.num_read in (0, tokens), f"{self.num_read} tokens of {tokens} were read"
        return {
            "open_cpu_us_per_stream": open_us,
            "open_s": open_s,
            "redis_cpu_us_per_token": (cpu_s(self.redis) - spent[1]) / tokens * 1e6,
            "worker_cpu_us_per_token": worker_s / tokens * 1e6,
            "client_cpu_us_per_token": (time.process_time() - spent[0]) / tokens * 1e6,
            "tokens_per_s": tokens / (time.monotonic() - spent[2]),
        }

    async def are_followed(self, ids: Sequence[str]) -> None:
        """Wait until the client follows all, where there is a reader."""
        keys = Keys(self.settings.namespace)
        with Client(settings=self.settings) as client:
            while self.readers != "none":
                calls = [Call(None, (), ("HEXISTS", keys.request(i), "followers"), int) for i in ids[::97]]
                if all(await asyncio.to_thread(client._executor.run_many, calls)):
                    return
                await asyncio.sleep(0.5)

    async def read(self, handle: Any) -> None:
        """Count the tokens of one stream."""
        async for chunk in handle.stream():
            self.num_read += len(chunk.token_ids)

    def read_here(self, handle: Any) -> None:
        """The same in a thread."""
        for chunk in handle.stream():
            with self._lock:
                self.num_read += len(chunk.token_ids)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--pause", type=float, default=4.0)
    parser.add_argument("--client", choices=("async", "threads"), default="async")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    found: dict[str, Any] = {"streams": given.streams}
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder), durability="fast", port=0) as redis:
        worker = context.Process(target=work, args=(theirs, redis.url, given), daemon=True)
        worker.start()
        for readers in ("none", given.client):
            told = asyncio.run(Run(redis, ours, given, readers=readers).measure())
            found |= {f"{readers}_{name}": value for name, value in told.items()}
        ours.send(None)
        worker.join()
    tell({**found, "machine": machine()}, as_json=given.json)


if __name__ == "__main__":
    main()
