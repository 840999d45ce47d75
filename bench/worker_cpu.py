"""CPU time of a vLLM worker for each token: what the worker itself needs beside its engine.

    python bench/worker_cpu.py [--running 16] [--tokens 300] [--rounds 3] [--json]

One worker with the tiny model decodes `--running` requests at a time, each to `--tokens` output tokens. The time
of the worker's process (takes, writes, tells Flower) and of the engine core's (the model) are read from the
system's own accounts. Where both share a core, the first is time that the second does not have.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from told import cpu_s, machine, tell

from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.client import AsyncClient


async def measure(*, num_running: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, after one to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        options = StackOptions(workers=1, engine="vllm", model="tiny", flower=False, data_dir=Path(folder))
        async with Stack(options) as stack:
            await stack.ready()
            async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
                await one_round(client, num_running, num_tokens)
                found = [await one_round(client, num_running, num_tokens) for _ in range(rounds)]
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {
        "running": num_running,
        "rounds": rounds,
        **medians,
        "machine": machine(),
    }


async def one_round(client: AsyncClient, num_running: int, num_tokens: int) -> dict[str, float]:
    """CPU microseconds per output token of the worker and of its engine core, and tokens per second."""
    worker, engine = processes()
    before, started_s = (cpu_s(worker), cpu_s(engine)), time.perf_counter()
    handles = await client.enqueue_many(["hello world"] * num_running, max_tokens=num_tokens, ignore_eos=True)
    async for _ in client.as_completed(handles, timeout=300):
        pass
    tokens = num_running * num_tokens
    spent_s = time.perf_counter() - started_s
    return {
        "worker_cpu_us_per_token": (cpu_s(worker) - before[0]) / tokens * 1e6,
        "engine_cpu_us_per_token": (cpu_s(engine) - before[1]) / tokens * 1e6,
        "tokens_per_s": tokens / spent_s,
    }


def processes() -> tuple[psutil.Process, psutil.Process]:
    """The worker and its engine core: the child of ours that has one."""
    for process in psutil.Process().children(recursive=True):
        if "EngineCore" in " ".join([process.name(), *process.cmdline()]):
            parent = process.parent()
            assert parent is not None
            return parent, process
    raise RuntimeError("no engine core: has the worker ended?")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = asyncio.run(measure(num_running=given.running, num_tokens=given.tokens, rounds=given.rounds))
    tell(found, as_json=given.json)


if __name__ == "__main__":
    main()
