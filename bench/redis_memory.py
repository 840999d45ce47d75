"""Memory in Redis of one waiting and one finished request, what the AOF takes, and whether a day fits.

    python bench/redis_memory.py [--requests 256]
    python bench/redis_memory.py --aof
    python bench/redis_memory.py --day [--scale 0.1]

A redis-server of its own; client, dispatcher and worker in this process. The engine is emulated at the pace of an
H100 and its text is that of the tiny model, so output is written as often and in such pieces as it would be. What
is shown is the growth of `used_memory`, divided by the number of requests, beside what l4queue counts for it.
With `--aof`: the growth of the AOF, and the time of an enqueue. With `--day`: as many requests as a day has at the
rate of docs/operations.md, and their bound, both reduced to the scale.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dispatcher.routing.service import Dispatcher
from dispatcher.routing.tokenizer import PromptTokenizer
from l4queue import AsyncClient, Settings
from l4queue.cli.stack.embedded import EmbeddedRedis
from l4queue.client import AsyncHandle
from l4queue.cost.coefficients import read_coefficients
from l4queue.model_cache import cache_directory
from l4queue.models import RequestState
from l4queue.policy.admission import unbounded_budget
from l4queue.protocol.calls import Call, Calls, Taker
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.records import Outcome
from l4queue.protocol.retention import Retention
from l4queue.tiny import build_tiny_tokenizer
from workers.engine.emulated.engine import EmulatedEngine
from workers.loop.text import text_factory
from workers.loop.worker import Worker
from workers.telemetry.observer import NullObserver

CASES = ((10, 20), (100, 100), (1000, 100), (1000, 500), (1000, 1024), (8000, 500))  # prompt and output tokens
DAY_S = 86_400
DAY_RATE_PER_S = 7.0
MAX_LEN = 65_536


async def told(executor: AsyncExecutor, section: str, name: str) -> int:
    """A figure of INFO."""

    def parse(reply: bytes | dict[str, int]) -> int:
        if isinstance(reply, dict):
            return int(reply[name])
        return int(reply.split(name.encode() + b":")[1].split(b"\r\n")[0])

    return await executor.run(Call(None, (), ("INFO", section), parse))


async def used_bytes(executor: AsyncExecutor, keys: Keys, client_id: str) -> int:
    """Memory in use for requests.

    Without the streams that keep their latest entries, however many requests there are, and without buffers.
    """
    used = await told(executor, "memory", "used_memory")
    for name in ("mem_clients_normal", "mem_aof_buffer"):
        used -= await told(executor, "memory", name)
    for key in (keys.finished, keys.mailbox(client_id)):
        used -= await executor.run(Call(None, (), ("MEMORY", "USAGE", key, "SAMPLES", 0), lambda r: int(r or 0)))
    return used


async def routed(client: AsyncClient) -> None:
    """Wait until nothing is in the inbox."""
    while (await client.overview()).inbox:  # noqa: ASYNC110 - nobody signals it
        await asyncio.sleep(0.1)


async def pack(executor: AsyncExecutor, keys: Keys) -> None:
    """What upkeep does a while after the end."""
    while (await executor.run(Retention(keys).pack(min_age_ms=0, max_requests=50, max_entries=1000))).has_more:
        pass


class Parts:
    """Dispatcher and worker in this process, on one Redis."""

    def __init__(self, url: str, namespace: str) -> None:
        self.settings = Settings(
            redis_url=url,
            namespace=namespace,
            max_model_len=MAX_LEN,
            max_running=256,
            max_backlog_tokens=10**12,
            max_backlog_bytes=10**12,
            max_result_bytes=10**12,
        )
        self.executor = AsyncExecutor(url)
        self.keys = Keys(namespace)
        tokenizer = PromptTokenizer("tiny", max_model_len=MAX_LEN)
        self.dispatcher = Dispatcher(settings=self.settings, executor=self.executor, tokenizer=tokenizer, name="d")

    def worker(self) -> Worker:
        """One that is not running yet."""
        cost = read_coefficients("h100", "llama-3.1-8b").cost
        return Worker(
            settings=self.settings,
            engine=EmulatedEngine(cost, speed=1.0, max_model_len=MAX_LEN),
            observer=NullObserver(),
            worker_id="w",
            text=text_factory(str(build_tiny_tokenizer(cache_directory()))),
            cost=cost,
        )

    async def counted(self, name: str) -> int:
        """One of the totals."""
        return await self.executor.run(Call(None, (), ("HGET", self.keys.counts, name), lambda r: int(r or 0)))


async def serve(parts: Parts, client: AsyncClient, requests: Sequence[AsyncHandle | dict[str, Any]]) -> None:
    """A worker that runs until these have ended; requests that are none yet are enqueued."""
    handles = [r if isinstance(r, AsyncHandle) else await client.enqueue(**r) for r in requests]
    worker = parts.worker()
    serving = asyncio.create_task(worker.run())
    async for _ in client.as_completed(handles, timeout=600):
        pass
    worker.request_stop()
    await serving


async def measure(url: str, *, prompt_tokens: int, output_tokens: int, num_requests: int) -> tuple[float, ...]:
    """Bytes of a waiting request, in use and counted; of a finished one, packed: the same."""
    parts = Parts(url, f"m{prompt_tokens}")
    executor, keys = parts.executor, parts.keys
    async with AsyncClient(settings=parts.settings) as client:
        client_id = client._core.client_id
        ids = [7 + n % 1000 for n in range(prompt_tokens)]
        request = {"token_ids": ids, "max_tokens": output_tokens, "ignore_eos": True}
        routing = asyncio.create_task(parts.dispatcher.run())
        await serve(parts, client, [request] * 64)  # what is there once is there then
        await pack(executor, keys)
        kept = await parts.counted("result_bytes")
        before = await used_bytes(executor, keys, client_id)
        handles = await client.enqueue_many([request] * num_requests)
        await routed(client)
        waiting = await used_bytes(executor, keys, client_id) - before, await parts.counted("live_bytes")
        await serve(parts, client, handles)
        parts.dispatcher.request_stop()
        await routing
        await pack(executor, keys)
        finished = await used_bytes(executor, keys, client_id) - before, await parts.counted("result_bytes") - kept
        await executor.close()
    return tuple(value / num_requests for value in (*waiting, *finished))


async def write_out(
    url: str, *, prompt_tokens: int, output_tokens: int, num_requests: int
) -> tuple[float, list[float], float]:
    """Bytes of the AOF for a request; times of single enqueues, s; enqueues/s of a thousand in one call."""
    parts = Parts(url, f"a{prompt_tokens}")
    async with AsyncClient(settings=parts.settings) as client:
        ids = [7 + n % 1000 for n in range(prompt_tokens)]
        request: dict[str, Any] = {"token_ids": ids, "max_tokens": output_tokens, "ignore_eos": True}
        worker = parts.worker()
        running = [asyncio.create_task(part.run()) for part in (parts.dispatcher, worker)]
        async for _ in client.as_completed([await client.enqueue(**request)]):
            pass
        before = await told(parts.executor, "persistence", "aof_current_size")
        handles = await client.enqueue_many([request] * num_requests)
        async for _ in client.as_completed(handles, timeout=600):
            pass
        await pack(parts.executor, parts.keys)
        written = (await told(parts.executor, "persistence", "aof_current_size") - before) / num_requests
        parts.dispatcher.request_stop()
        worker.request_stop()
        await asyncio.gather(*running)
        took_s = []  # with nobody else in this process
        for _ in range(300):
            began_s = time.perf_counter()
            await client.enqueue(**request)
            took_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        await client.enqueue_many([request] * 1000)
        rate = 1000 / (time.perf_counter() - began_s)
        await parts.executor.close()
    return written, took_s, rate


def live_a_day(url: str, *, num_requests: int, max_bytes: int) -> None:
    """Short requests one after the other from the beginning to the end, packed and bounded as upkeep does."""
    executor, keys = Executor(url), Keys("day")
    calls, keeping = Calls(keys), Retention(keys)
    owner: dict[str, Any] = {"incarnation": "w:1", "epoch": 1}
    outcome = Outcome(state=RequestState.DONE, finish_reason="length")
    register = calls.renew("w:1", worker_id="w", lease_ms=10**9, load="{}", sequence=0, register=True)
    info: Call[Any] = Call(None, (), ("INFO", "memory"), lambda reply: reply["used_memory"])
    executor.run(register)
    empty, dropped, most = executor.run(info), 0, 0
    for start in range(0, num_requests, 50):
        ids = [uuid.uuid4().hex for _ in range(50)]
        common: dict[str, Any] = {"digest": "", "kind": "p", "prompt": b"Name a river.", "client_id": "c"}
        bounds = {"max_live_tokens": 10**9, "max_live_bytes": 10**9, "deadline_ms": 0, "ttl_ms": DAY_S * 1000}
        body = '{"params":{"max_tokens":20}}'
        executor.run_many([calls.submit(i, body=body, charge_tokens=30, **common, **bounds) for i in ids])
        entries = executor.run(Call(None, (), ("XRANGE", keys.inbox, "-", "+"), list))
        where = {fields[b"i"].decode(): entry.decode() for entry, fields in entries}
        route: dict[str, Any] = {"stage": "0", "score": 1.0, "token_ids": range(4), "max_tokens": 20}
        executor.run_many([calls.route(i, entry_id=where[i], plan_version=0, bucket=2, **route) for i in ids])
        taker = Taker(worker_id="w", incarnation="w:1", stage="0")
        budget = unbounded_budget(50, reason="benchmark")
        executor.run(calls.take("0", taker=taker, nonce=str(start), budget=budget))
        for offset in range(0, 20, 4):
            part: dict[str, Any] = {"offset": offset, "token_ids": range(4), "text": " a word or two"}
            executor.run_many([calls.emit(i, **owner, **part) for i in ids])
        last: dict[str, Any] = {"offset": 20, "token_ids": (), "text": "", "outcome": outcome}
        executor.run_many([calls.settle(i, **owner, **last) for i in ids])
        executor.run(keeping.pack(min_age_ms=0, max_requests=100, max_entries=10**4))
        evicted = executor.run(keeping.evict(max_bytes=max_bytes, limit=200))
        dropped, most = dropped + evicted.num_dropped, max(most, executor.run(info) - empty)
    print(
        f"{num_requests:,} requests; results counted {evicted.kept_bytes / 1e6:.1f} of {max_bytes / 1e6:.1f} MB,"
    )
    print(f"most memory in use {most / 1e6:.1f} MB, {dropped} results went early")
    executor.close()


def measure_memory(num_requests: int) -> None:
    """Its table."""
    print("| prompt | output tokens | waiting, bytes | counted | finished, bytes | counted |")
    print("|---|---|---|---|---|---|")
    for prompt_tokens, output_tokens in CASES:
        sizes: dict[str, int] = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        with redis_of_its_own("fast") as url:
            figures = asyncio.run(measure(url, num_requests=num_requests, **sizes))
        shown = " | ".join(f"{value:,.0f}" for value in figures)
        print(f"| {prompt_tokens} | {output_tokens} | {shown} |", flush=True)


def measure_aof(num_requests: int) -> None:
    """Its table."""
    print("| appendfsync | prompt | output tokens | AOF, bytes | enqueue p50, ms | p99, ms | enqueue_many, 1/s |")
    print("|---|---|---|---|---|---|---|")
    modes: tuple[tuple[str, Literal["strict", "fast"]], ...] = (("always", "strict"), ("everysec", "fast"))
    for name, durability in modes:
        for prompt_tokens, output_tokens in ((100, 100), (1000, 500)):
            sizes = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
            with redis_of_its_own(durability) as url:
                written, took_s, rate = asyncio.run(write_out(url, num_requests=num_requests, **sizes))
            p50, p99 = statistics.median(took_s) * 1000, statistics.quantiles(took_s, n=100)[98] * 1000
            figures = f"{written:,.0f} | {p50:.2f} | {p99:.2f} | {rate:,.0f}"
            print(f"| {name} | {prompt_tokens} | {output_tokens} | {figures} |", flush=True)


@contextmanager
def redis_of_its_own(durability: Literal["strict", "fast"]) -> Iterator[str]:
    """Its URL; it is empty at first."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis(Path(folder), durability=durability, port=0) as redis,
    ):
        yield redis.url


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--aof", action="store_true", help="bytes of the AOF and times of an enqueue instead")
    parser.add_argument("--day", action="store_true", help="a day of short requests instead")
    parser.add_argument("--scale", type=float, default=0.1, help="share of the day")
    given = parser.parse_args()
    if given.day:
        number = round(DAY_RATE_PER_S * DAY_S * given.scale)
        bound = round(Settings().max_result_bytes * given.scale)
        with redis_of_its_own("fast") as url:
            live_a_day(url, num_requests=number, max_bytes=bound)
    elif given.aof:
        measure_aof(given.requests)
    else:
        measure_memory(given.requests)


if __name__ == "__main__":
    main()
