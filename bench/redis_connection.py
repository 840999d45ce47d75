"""CPU time of a calling process for one Redis command: what we ship, redis-py, and other asyncio clients.

    python bench/redis_connection.py [--rounds 5] [--commands 4096] [--json FILE] [CLIENT ...]

A redis-server of its own. Each figure is from a process of its own: CPU time of all its threads, user and system,
without Redis, for HMGET of four short fields; rounds are interleaved, medians and the least shown. `one` waits for
each reply, `pipeline` sends 64 at once, `tasks` has 32 tasks that wait for each reply of theirs. `bare` is a
connection without timeouts, errors or reconnects: about what Python and hiredis need. Clients that are not there
are left out (`pip install coredis valkey-glide redis-rs`). `+uvloop` after a name runs it on uvloop.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from l4queue.cli.stack.embedded import EmbeddedRedis
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import AsyncExecutor
from l4queue.redis_url import parse_url

KEY, FIELDS = "{b}:h", ("a", "b", "c", "d")
COMMAND = ("HMGET", KEY, *FIELDS)
BATCH, TASKS = 64, 32
WARM_UP = 512  # commands before the clock starts

One = Callable[[], Awaitable[Any]]
Many = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def l4queue_client(url: str) -> AsyncIterator[tuple[One, Many]]:
    """What we ship, with retries, timeouts and parsing."""
    executor = AsyncExecutor(url)
    call: Call[Any] = Call(None, (), COMMAND, lambda reply: reply)
    calls = [call] * BATCH
    yield lambda: executor.run(call), lambda: executor.run_many(calls)
    await executor.close()


@asynccontextmanager
async def redis_py(url: str) -> AsyncIterator[tuple[One, Many]]:
    """redis-py with hiredis, protocol 2, without retries."""
    import redis.asyncio as aredis

    client = aredis.Redis.from_url(url, protocol=2, socket_timeout=5.0)

    async def many() -> None:
        async with client.pipeline(transaction=False) as pipe:
            for _ in range(BATCH):
                pipe.execute_command(*COMMAND)
            await pipe.execute()

    yield lambda: client.execute_command(*COMMAND), many
    await client.aclose()


@asynccontextmanager
async def coredis(url: str) -> AsyncIterator[tuple[One, Many]]:
    """coredis: pure Python parser, multiplexed pool."""
    import coredis as library

    async with library.Redis.from_url(url, stream_timeout=5.0) as client:

        async def many() -> None:
            async with client.pipeline(transaction=False) as pipe:
                for _ in range(BATCH):
                    pipe.hmget(KEY, FIELDS)

        yield lambda: client.hmget(KEY, FIELDS), many


@asynccontextmanager
async def valkey_glide(url: str) -> AsyncIterator[tuple[One, Many]]:
    """valkey-glide: a core in Rust on threads of its own."""
    import glide

    address = parse_url(url)
    places = [glide.NodeAddress(address.host, address.port)]
    login = glide.ServerCredentials(password=address.password) if address.password else None
    configuration = glide.GlideClientConfiguration(places, credentials=login, request_timeout=5000)
    client = await glide.GlideClient.create(configuration)

    async def many() -> None:
        batch = glide.Batch(is_atomic=False)
        for _ in range(BATCH):
            batch.hmget(KEY, list(FIELDS))
        await client.exec(batch, raise_on_error=False)

    yield lambda: client.hmget(KEY, list(FIELDS)), many
    await client.close()


@asynccontextmanager
async def redis_rs(url: str) -> AsyncIterator[tuple[One, Many]]:
    """redis-rs: the Rust client behind PyO3; it has no pipelines, so the 64 are run side by side."""
    import redis_rs as library

    async with library.create_client(url) as client:

        async def many() -> None:
            await asyncio.gather(*(client.execute(*COMMAND) for _ in range(BATCH)))

        yield lambda: client.execute(*COMMAND), many


class _Bare(asyncio.Protocol):
    """Commands out, replies to futures in order, and nothing else."""

    def __init__(self) -> None:
        import hiredis

        self._reader, self._pack = hiredis.Reader(), hiredis.pack_command
        self._waiting: deque[list[Any]] = deque()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            entry = self._waiting[0]
            entry[1].append(reply)
            if len(entry[1]) == entry[2]:
                self._waiting.popleft()
                entry[0].set_result(entry[1])

    async def send(self, number: int, command: tuple[str, ...] = COMMAND) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append([future, [], number])
        self.transport.write(b"".join([self._pack(command) for _ in range(number)]))
        return await future


@asynccontextmanager
async def bare(url: str) -> AsyncIterator[tuple[One, Many]]:
    """The least that Python and hiredis need."""
    address = parse_url(url)
    transport, connection = await asyncio.get_running_loop().create_connection(_Bare, address.host, address.port)
    if address.password:
        await connection.send(1, ("AUTH", address.password))
    yield lambda: connection.send(1), lambda: connection.send(BATCH)
    transport.close()


CLIENTS = {
    "l4queue": (l4queue_client, "redis"),
    "redis-py": (redis_py, "redis"),
    "coredis": (coredis, "coredis"),
    "valkey-glide": (valkey_glide, "glide"),
    "redis-rs": (redis_rs, "redis_rs"),
    "bare": (bare, "hiredis"),
}


async def measure(name: str, url: str, num_commands: int) -> dict[str, float]:
    """CPU time of one command, us, by way of sending."""
    async with CLIENTS[name][0](url) as (one, many):

        async def in_row(number: int) -> None:
            for _ in range(number):
                await one()

        async def in_pipelines(number: int) -> None:
            for _ in range(number // BATCH):
                await many()

        async def in_tasks(number: int) -> None:
            await asyncio.gather(*(in_row(number // TASKS) for _ in range(TASKS)))

        found = {}
        for way, work in (("one", in_row), ("pipeline", in_pipelines), ("tasks", in_tasks)):
            await work(WARM_UP)
            before_s = time.process_time()
            await work(num_commands)
            found[way] = (time.process_time() - before_s) / num_commands * 1e6
        return found


def in_process(name: str, url: str, num_commands: int) -> dict[str, float]:
    """The same in a process of its own."""
    words = (sys.executable, __file__, "--inside", name, url, str(num_commands))
    return json.loads(subprocess.run(words, check=True, capture_output=True).stdout.splitlines()[-1])


def inside(name: str, url: str, num_commands: str) -> None:
    """What such a process does."""
    name, _, loop = name.partition("+")
    factory = None
    if loop:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(measure(name, url, int(num_commands)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    names = [n for n in given.clients if importlib.util.find_spec(CLIENTS[n.partition("+")[0]][1]) is not None]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder), port=0) as server:
        url = server.url.reveal()
        asyncio.run(_prepare(url))
        for _ in range(given.rounds):
            for name in names:
                rounds[name].append(in_process(name, url, given.commands))
    print(
        f"{'CPU us a command, median (least)':34}" + "".join(f"{way:>18}" for way in ("one", "pipeline", "tasks"))
    )
    for name, found in rounds.items():
        cells = [[one[way] for one in found] for way in ("one", "pipeline", "tasks")]
        print(f"{name:34}" + "".join(f"{statistics.median(c):10.1f} ({min(c):5.1f})" for c in cells))
    if given.json:
        given.json.write_text(json.dumps({"commands": given.commands, "rounds": rounds}, indent=1))


async def _prepare(url: str) -> None:
    executor = AsyncExecutor(url)
    words = [part for field in FIELDS for part in (field, f"value-{field}")]
    await executor.run(Call(None, (), ("HSET", KEY, *words), int))
    await executor.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:])
    else:
        main()
