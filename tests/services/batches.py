"""The files of a batch, and runs of it through a pipeline."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from l4queue import Client
from l4queue.client import BatchProgress, BatchSummary
from tests.services.pipeline import Pipeline

__all__ = ("Files", "has_submitted", "run", "stopped_when", "submitted", "write_lines")


def write_lines(path: Path, num_lines: int, *, max_tokens: int = 2, chats: bool = True) -> None:
    """Chats and completions in turn."""
    with path.open("w") as file:
        for i in range(num_lines):
            body: dict[str, Any] = {"max_tokens": max_tokens, "prompt": f"line {i}"}
            if chats and i % 2:
                body = {"max_tokens": max_tokens, "messages": [{"role": "user", "content": f"line {i}"}]}
            file.write(json.dumps({"custom_id": f"c{i}", "body": body}) + "\n")


class Files:
    """The files of one batch."""

    def __init__(self, folder: Path) -> None:
        self.lines, self.out = folder / "in.jsonl", folder / "out.jsonl"
        self.errors = folder / "out.jsonl.errors.jsonl"

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_bytes().splitlines()] if self.out.exists() else []

    def failures(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.errors.read_bytes().splitlines()]

    def custom_ids(self) -> Counter[str]:
        return Counter(answer["custom_id"] for answer in self.answers() + self.failures())


async def run(pipeline: Pipeline, files: Files, **options: Any) -> BatchSummary:
    """As the user of the asyncio client does."""
    async with asyncio.timeout(300):
        return await pipeline.client.run_batch(files.lines, files.out, **options)


async def submitted(pipeline: Pipeline) -> int:
    """Requests accepted since the beginning."""
    return int((await pipeline.client.overview()).counts.get("submitted", 0))


@asynccontextmanager
async def stopped_when(
    pipeline: Pipeline, files: Files, num_in_flight: int, **options: Any
) -> AsyncIterator[asyncio.Task[BatchSummary]]:
    """A batch that is stopped once so many requests are in flight; inside, it runs with these."""
    stop, reached = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def look(progress: BatchProgress) -> None:
        if progress.num_in_flight >= num_in_flight:
            loop.call_soon_threadsafe(reached.set)

    with Client(settings=pipeline.settings) as client:
        work = asyncio.create_task(
            asyncio.to_thread(client.run_batch, files.lines, files.out, progress=look, stop=stop, **options)
        )
        try:
            async with asyncio.timeout(300):
                await reached.wait()
            yield work
        finally:
            stop.set()
            await work


async def has_submitted(pipeline: Pipeline) -> bool:
    """Whether any request was accepted."""
    return await submitted(pipeline) > 0
