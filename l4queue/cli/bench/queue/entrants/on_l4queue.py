"""The client of l4queue in `bench queue`; its dispatcher and worker are those of `l4queue up`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from pacing import Sender, redis_url, serve

from l4queue import AsyncClient


class L4Sender(Sender):
    """As the README has it: enqueue_many and results; a stream for the first token."""

    packages = ("l4queue", "redis", "hiredis")

    async def open(self) -> None:
        self.client = AsyncClient(redis_url())
        await self.client.ping()

    async def close(self) -> None:
        await self.client.close()

    async def rush(self, prompts: Sequence[Any]) -> float:
        began_s = time.perf_counter()
        handles = await self.client.enqueue_many([_request(prompt) for prompt in prompts], max_tokens=1)
        sent_s = time.perf_counter() - began_s
        results = await asyncio.gather(*(handle.result() for handle in handles))
        assert all(result.output_tokens == 1 for result in results)
        return sent_s

    async def one(self, prompt: Any, *, what: str) -> float:
        handle = await self.client.enqueue(**_request(prompt), max_tokens=1)
        if what == "result":
            await handle.result()
            return time.perf_counter()
        at_s = 0.0
        async for _ in handle.stream():
            at_s = at_s or time.perf_counter()
        return at_s


def _request(prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else {"token_ids": prompt}


if __name__ == "__main__":
    serve(L4Sender())
