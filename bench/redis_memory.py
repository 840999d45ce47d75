"""Memory in Redis of one waiting and one finished request.

    python bench/redis_memory.py [--requests 256]

A redis-server of its own; client, dispatcher and worker in this process. The engine is emulated at the pace of an
H100 and its text is that of the tiny model, so output is written as often and in such pieces as it would be. What
is shown is the growth of `used_memory`, divided by the number of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from dispatcher.service import Dispatcher
from dispatcher.tokenizer import PromptTokenizer
from l4queue import AsyncClient, Settings
from l4queue.cli.embedded import EmbeddedRedis
from l4queue.policy.coefficients import read_coefficients
from l4queue.protocol.calls import Call
from l4queue.protocol.door import AsyncDoor
from l4queue.tiny import build_tiny_tokenizer, cache_directory
from workers.emulated import EmulatedEngine
from workers.observer import NullObserver
from workers.text import text_factory
from workers.worker import Worker

CASES = ((100, 100), (1000, 100), (1000, 500), (8000, 500))  # prompt and output tokens
MAX_LEN = 65_536


async def used_bytes(door: AsyncDoor) -> int:
    """Memory that Redis has given out."""

    def parse(reply: bytes | dict[str, int]) -> int:
        if isinstance(reply, dict):
            return int(reply["used_memory"])
        return int(reply.split(b"used_memory:")[1].split(b"\r\n")[0])

    return await door.run(Call(None, (), ("INFO", "memory"), parse))


async def routed(client: AsyncClient) -> None:
    """Wait until nothing is in the inbox."""
    while (await client.overview()).inbox:  # noqa: ASYNC110 - nobody signals it
        await asyncio.sleep(0.1)


async def measure(url: str, *, prompt_tokens: int, output_tokens: int, num_requests: int) -> tuple[float, float]:
    """Bytes of a waiting and of a finished request."""
    settings = Settings(
        redis_url=url,
        namespace=f"m{prompt_tokens}",
        max_model_len=MAX_LEN,
        max_running=256,
        max_backlog_tokens=10**12,
        max_backlog_bytes=10**12,
    )
    door = AsyncDoor(url)
    tokenizer = PromptTokenizer("tiny", max_model_len=MAX_LEN)
    dispatcher = Dispatcher(settings=settings, door=door, tokenizer=tokenizer, name="d")
    cost = read_coefficients("h100", "llama-3.1-8b").cost
    worker = Worker(
        settings=settings,
        engine=EmulatedEngine(cost, speed=1.0, max_model_len=MAX_LEN),
        observer=NullObserver(),
        worker_id="w",
        text=text_factory(str(build_tiny_tokenizer(cache_directory()))),
        cost=cost,
    )
    async with AsyncClient(settings=settings) as client:
        ids = [7 + n % 1000 for n in range(prompt_tokens)]
        request = {"token_ids": ids, "max_tokens": output_tokens, "ignore_eos": True}
        routing = asyncio.create_task(dispatcher.run())
        warm = await client.enqueue_many([request | {"max_tokens": 1}] * 256)  # scripts and buffers are there then
        await routed(client)
        await asyncio.gather(*(handle.cancel() for handle in warm))
        before = await used_bytes(door)
        handles = await client.enqueue_many([request] * num_requests)
        await routed(client)
        waiting = await used_bytes(door) - before
        serving = asyncio.create_task(worker.run())
        async for _ in client.as_completed(handles, timeout=600):
            pass
        worker.request_stop()
        dispatcher.request_stop()
        await asyncio.gather(routing, serving)
        finished = await used_bytes(door) - before
        await door.close()
    return waiting / num_requests, finished / num_requests


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    given = parser.parse_args()
    print("| prompt tokens | output tokens | waiting, bytes | finished, bytes |\n|---|---|---|---|")
    for prompt_tokens, output_tokens in CASES:
        with (
            tempfile.TemporaryDirectory() as folder,
            EmbeddedRedis(Path(folder), durability="fast", port=0) as redis,
        ):
            number = given.requests
            waiting, finished = asyncio.run(
                measure(redis.url, prompt_tokens=prompt_tokens, output_tokens=output_tokens, num_requests=number)
            )
            print(f"| {prompt_tokens} | {output_tokens} | {waiting:,.0f} | {finished:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
