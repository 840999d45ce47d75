"""The HTTP gateway against plain `vllm serve`, and against the Python client: same answers, and its overhead.

    python bench/gateway.py [--requests 200] [--rounds 60] [--json]

First the answers: greedy requests, each whole and streamed, from plain `vllm serve` of the tiny model and then
from a gateway before one vLLM worker, compared field by field without ids and times. Then the overhead at idle:
one request at a time, 32 tokens, streamed by the Python client and through the gateway in turn; and its memory.
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
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from told import machine, tell

from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.client import AsyncClient
from l4queue.model_cache import cache_directory
from tests.e2e.openai_bodies import BODIES, MODEL, whole_and_streamed
from tests.e2e.test_gateway_vllm import MAX_MODEL_LEN, plain_vllm
from workers.tiny import build_tiny_model

NUM_TOKENS = 32
PROMPT = "The return statement ends a function"


def bodies(number: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """So many requests: each kind of body again and again, with other prompts."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for turn in itertools.count():
        for name, (path, body) in BODIES.items():
            if len(found) == number:
                return found
            varied = dict(body)
            if turn and isinstance(body.get("prompt"), str):
                varied["prompt"] = f"{body['prompt']} {turn} times"
            elif turn and "messages" in body:
                varied["messages"] = [{"role": "user", "content": f"Turn {turn}."}, *body["messages"]]
            found[f"{name} {turn}"] = path, varied
    raise AssertionError


async def overhead(stack: Stack, *, rounds: int) -> dict[str, Any]:
    """First token and time per token, ms, by the way that a request takes."""
    times: dict[str, list[tuple[float, float]]] = {"python": [], "http": []}
    async with (
        AsyncClient(stack.redis_url, settings=stack.settings) as client,
        httpx.AsyncClient(base_url=str(stack.openai_url), timeout=120) as http,
    ):
        for number in range(rounds + 5):
            for name, measured in (("python", by_python(client)), ("http", by_http(http))):
                first_ms, token_ms = await measured
                if number >= 5:
                    times[name].append((first_ms, token_ms))
    return {
        name: {
            "first_token_p50_ms": round(statistics.median(first for first, _ in found), 2),
            "per_token_p50_ms": round(statistics.median(token for _, token in found), 3),
        }
        for name, found in times.items()
    }


async def by_python(client: AsyncClient) -> tuple[float, float]:
    """One request of the Python client."""
    begun_s = time.perf_counter()
    handle = await client.enqueue(PROMPT, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    first_s = None
    async for _ in handle.stream():
        first_s = first_s or time.perf_counter()
    return _figures(begun_s, first_s or begun_s)


async def by_http(http: httpx.AsyncClient) -> tuple[float, float]:
    """One request through the gateway."""
    begun_s = time.perf_counter()
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    first_s = None
    async with http.stream("POST", "/completions", json={**body, "stream": True}) as answer:
        async for _ in answer.aiter_raw():
            first_s = first_s or time.perf_counter()
    return _figures(begun_s, first_s or begun_s)


def _figures(begun_s: float, first_s: float) -> tuple[float, float]:
    return (first_s - begun_s) * 1000, (time.perf_counter() - first_s) * 1000 / (NUM_TOKENS - 1)


async def measure(*, num_requests: int, rounds: int) -> dict[str, Any]:
    """Answers that differ, overhead, memory."""
    os.environ["L4_DTYPE"], os.environ["L4_MAX_MODEL_LEN"] = "float32", str(MAX_MODEL_LEN)
    asked = bodies(num_requests)
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_model(cache_directory())
        with plain_vllm(model, Path(folder)) as url, httpx.Client(base_url=url, timeout=300) as client:
            wanted = await asyncio.to_thread(whole_and_streamed, client, asked)
        options = StackOptions(
            workers=1, engine="vllm", model="tiny", flower=False, http=True, data_dir=Path(folder)
        )
        async with Stack(options) as stack:
            await stack.ready()
            base = str(stack.openai_url).removesuffix("/v1")
            with httpx.Client(base_url=base, timeout=300) as client:
                found = await asyncio.to_thread(whole_and_streamed, client, asked)
            pid = stack.supervisor.children["gateway"].pid
            assert pid is not None
            timed = await overhead(stack, rounds=rounds)
            memory = psutil.Process(pid).memory_info().rss
    differing = [name for name, answer in wanted.items() if found[name] != answer]
    return {
        "num_answers": len(wanted),
        "num_differing": len(differing),
        "differing": differing[:10],
        "rounds": rounds,
        **timed,
        "gateway_resident_mib": round(memory / 2**20),
        "machine": machine(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = asyncio.run(measure(num_requests=arguments.requests, rounds=arguments.rounds))
    tell(found, as_json=arguments.json)


if __name__ == "__main__":
    main()
