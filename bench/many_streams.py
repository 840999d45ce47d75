"""Many streams at once: the CPU of Redis, and how late tokens come to clients in processes of their own.

    python bench/many_streams.py [--streams 1000] [--tokens-per-s 50] [--clients 10] [--workers 8] [--seconds 20]
        [--interval-ms 50] [--json]

A redis-server of its own (AOF once a second). One process writes as that many workers do, by their scripts: the
tokens of each stream once in the interval (`L4_EMIT_INTERVAL_MS`), workers one after the other within it. There is
no engine. Each client is a process that follows its share of the streams. A token is late by its wait in the
worker for the next write, `interval / 2` on average, and by its way through Redis to the reader.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from streams import Worker
from told import cpu_s, machine, tell

from l4queue import AsyncClient, Client, Settings
from l4queue.cli.stack.embedded import EmbeddedRedis

_NAMESPACE = "streams"
_EVERYTHING = 10**12


def settings_of(url: str) -> Settings:
    """Settings of the deployment under test: nothing is refused."""
    return Settings(
        redis_url=url,
        namespace=_NAMESPACE,
        max_backlog_tokens=_EVERYTHING,
        max_backlog_bytes=_EVERYTHING,
    )


def write(pipe: Connection, url: str, ids: Sequence[str], given: argparse.Namespace) -> None:
    """The process of the workers. Each text ends with the time at which it was written."""
    worker = Worker(url, _NAMESPACE)
    worker.take(ids)
    pipe.send("taken")
    pipe.recv()
    interval_s, num_ticks = given.interval_ms / 1000, round(given.seconds * 1000 / given.interval_ms)
    shares = [ids[number :: given.workers] for number in range(given.workers)]
    begun_s, begun_cpu_s, late_s, offset = time.monotonic(), time.process_time(), 0.0, 0
    for tick in range(num_ticks):
        num = round((tick + 1) * interval_s * given.tokens_per_s) - offset
        for number, share in enumerate(shares):
            wait_s = begun_s + (tick + number / given.workers) * interval_s - time.monotonic()
            time.sleep(max(0.0, wait_s))
            late_s = max(late_s, -wait_s)
            if num:
                worker.write(share, offset=offset, num=num, text=" token" * num + f" {time.time():.6f}")
        offset += num
    spent_s = time.process_time() - begun_cpu_s
    worker.settle(ids, offset=offset)
    pipe.send((offset, spent_s, late_s))


def follow(pipe: Connection, url: str, ids: Sequence[str]) -> None:
    """The process of a client: how late each chunk came, s, with its number of tokens."""
    pipe.send(asyncio.run(_follow(pipe, url, ids)))


async def _follow(pipe: Connection, url: str, ids: Sequence[str]) -> tuple[list[tuple[float, int]], float]:
    chunks: list[tuple[float, int]] = []

    async def read(handle: Any) -> None:
        async for chunk in handle.stream():
            if chunk.token_ids:
                chunks.append((time.time() - float(chunk.text.rsplit(" ", 1)[1]), len(chunk.token_ids)))

    async with AsyncClient(settings=settings_of(url)) as client:
        reading = [asyncio.create_task(read(await client.get(request_id))) for request_id in ids]
        while not await _are_followed(client, ids):  # noqa: ASYNC110 - nobody signals it
            await asyncio.sleep(0.1)
        pipe.send("follows")
        begun_s = time.process_time()
        await asyncio.gather(*reading)
        return chunks, time.process_time() - begun_s


async def _are_followed(client: AsyncClient, ids: Sequence[str]) -> bool:
    from l4queue.protocol.calls import Call
    from l4queue.protocol.keys import Keys

    keys = Keys(_NAMESPACE)
    calls = [Call(None, (), ("HEXISTS", keys.request(i), "followers"), int) for i in ids]
    return all(await client._executor.run_many(calls))


def measure(given: argparse.Namespace, redis: EmbeddedRedis) -> dict[str, Any]:
    """One run: figures by name."""
    with Client(settings=settings_of(redis.url)) as client:
        ids = [handle.id for handle in client.enqueue_many(["hello"] * given.streams, max_tokens=1)]
    context = multiprocessing.get_context("spawn")
    writer, writers_end = context.Pipe()
    context.Process(target=write, args=(writers_end, redis.url, ids, given), daemon=True).start()
    writer.recv()
    readers = []
    for number in range(given.clients):
        pipe, end = context.Pipe()
        context.Process(target=follow, args=(end, redis.url, ids[number :: given.clients]), daemon=True).start()
        readers.append(pipe)
    for pipe in readers:
        pipe.recv()
    server = psutil.Process(redis.pid)
    begun_s, begun_cpu_s = time.monotonic(), cpu_s(server)
    writer.send("go")
    num_tokens, writer_s, late_s = writer.recv()
    took_s, redis_s = time.monotonic() - begun_s, cpu_s(server) - begun_cpu_s
    answers = [pipe.recv() for pipe in readers]
    late_ms = np.array([one for chunks, _ in answers for one, _ in chunks]) * 1000
    counts = np.array([count for chunks, _ in answers for _, count in chunks])
    assert counts.sum() == num_tokens * len(ids), "tokens were lost"
    # A token of k in a chunk waited for the write for 0, 1, ... k-1 parts of the interval.
    waits_ms = np.concatenate([np.arange(k) / k * given.interval_ms for k in counts])
    token_ms = np.repeat(late_ms, counts) + waits_ms
    return {
        "streams": given.streams,
        "clients": given.clients,
        "tokens_per_s": num_tokens * len(ids) / took_s,
        "chunks_per_s": len(counts) / took_s,
        "redis_cores": redis_s / took_s,
        "redis_us_per_chunk": redis_s / len(counts) * 1e6,
        "writer_cores": writer_s / took_s,
        "clients_cores": sum(spent_s for _, spent_s in answers) / took_s,
        "writer_late_ms": late_s * 1000,
        "way_p50_ms": float(np.median(late_ms)),
        "way_p99_ms": float(np.quantile(late_ms, 0.99)),
        "token_p50_ms": float(np.median(token_ms)),
        "token_p99_ms": float(np.quantile(token_ms, 0.99)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens-per-s", type=float, default=50.0)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--interval-ms", type=float, default=50.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder), durability="fast", port=0) as redis:
        tell({**measure(given, redis), "machine": machine()}, as_json=given.json)


if __name__ == "__main__":
    main()
