"""Requests per second through the whole path: one client, one dispatcher, one worker without model time.

    python bench/pipeline.py [--requests 5000] [--rounds 5] [--durability strict] [--json]

Every process is real: redis-server, dispatcher with its tokenizer, Celery worker with the emulated engine at
speed 0, planner, beat. Each request has a two-word prompt and one output token; its result is stored and the
client learns of each end. Latency is measured apart, one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from told import machine, tell

from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.client import AsyncClient


async def measure(*, num_requests: int, rounds: int, num_latencies: int, durability: str) -> dict[str, Any]:
    """Medians over the rounds, after one to warm up."""
    os.environ["L4_EMULATED_SPEED"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        options = StackOptions(
            workers=1, engine="emulated", model="tiny", flower=False, durability=durability, data_dir=Path(folder)
        )
        async with Stack(options) as stack:
            await stack.ready()
            async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
                await one_round(client, num_requests)
                rates = [await one_round(client, num_requests) for _ in range(rounds)]
                latencies_ms = [await one_latency_ms(client) for _ in range(num_latencies)]
    quantiles = statistics.quantiles(latencies_ms, n=100)
    return {
        "num_requests": num_requests,
        "rounds": rounds,
        "durability": durability,
        "requests_per_s": statistics.median(end for _, end in rates),
        "requests_per_s_by_round": [round(end, 1) for _, end in rates],
        "enqueued_per_s": statistics.median(sent for sent, _ in rates),
        "result_latency_p50_ms": statistics.median(latencies_ms),
        "result_latency_p99_ms": quantiles[98],
        "machine": machine(),
    }


async def one_round(client: AsyncClient, num_requests: int) -> tuple[float, float]:
    """Requests per second: accepted, and finished."""
    started_s = time.perf_counter()
    handles = await client.enqueue_many(["hello world"] * num_requests, max_tokens=1)
    sent_s = time.perf_counter() - started_s
    finished = 0
    async for _ in client.as_completed(handles, timeout=120):
        finished += 1
    assert finished == num_requests
    return num_requests / sent_s, num_requests / (time.perf_counter() - started_s)


async def one_latency_ms(client: AsyncClient) -> float:
    """From enqueue to the result in hand, ms."""
    started_s = time.perf_counter()
    await (await client.enqueue("hello world", max_tokens=1)).result(timeout=30)
    return (time.perf_counter() - started_s) * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latencies", type=int, default=200)
    parser.add_argument("--durability", choices=("strict", "fast"), default="strict")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = asyncio.run(
        measure(
            num_requests=given.requests,
            rounds=given.rounds,
            num_latencies=given.latencies,
            durability=given.durability,
        )
    )
    tell(found, as_json=given.json)


if __name__ == "__main__":
    main()
