"""The client process of an entrant: it reads orders on standard input, one JSON object a line, and answers each.

All entrants in Python run this same file, l4queue too; it needs the standard library only.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from importlib.metadata import version
from typing import Any

__all__ = ("CONCURRENCY", "RESULT", "Sender", "gathered", "redis_url", "run", "serve")

CONCURRENCY = 64
"""Jobs at once in a worker: what l4queue's worker runs by default (`max_running`)."""
RESULT = "ok"
"""Of every job of a peer: as short as one token."""
_AT_ONCE = 8  # waits of a client that has to ask for each result: more only queue up in its own process
_WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them "
_VOCABULARY = 900  # ids of the prompts in token ids: the tiny model knows these


def redis_url() -> str:
    """Of the server of this entrant, with its password: by environment, as any user can read a command line."""
    return os.environ["BENCH_REDIS_URL"]


class Sender(ABC):
    """How one queue is used: implemented by each entrant."""

    packages: tuple[str, ...] = ()
    """Packages whose versions are told."""
    can_pace = True
    """Whether `one` may run many times at once."""
    uses_uvloop = False
    """Whether it runs on uvloop, which its environment then has."""
    prepared: Sequence[Any] = ()

    @abstractmethod
    async def open(self) -> None:
        """Connect."""

    @abstractmethod
    async def close(self) -> None:
        """Let go."""

    @abstractmethod
    async def rush(self, prompts: Sequence[Any]) -> float:
        """Enqueue all, and return with all results in hand: seconds until the last one was accepted."""

    @abstractmethod
    async def one(self, prompt: Any, *, what: str) -> float:
        """Enqueue one: the clock (`time.perf_counter`) at its `first` token, or with its `result` in hand."""


async def gathered(one: Callable[[Any], Awaitable[Any]], items: Iterable[Any], *, at_once: int = _AT_ONCE) -> None:
    """Await `one` for all items in order, a bounded number at a time; each must come to `RESULT`."""
    left = iter(items)

    async def work() -> None:
        for item in left:
            found = await one(item)
            assert found == RESULT, found

    await asyncio.gather(*(work() for _ in range(at_once)))


def run(main: Coroutine[Any, Any, None], *, uses_uvloop: bool) -> None:
    """asyncio.run, on uvloop if so."""
    if uses_uvloop:
        import uvloop

        uvloop.run(main)
    else:
        asyncio.run(main)


def prompts_of(order: dict[str, Any]) -> list[Any]:
    """Prompts of an order, each different: `bytes` of text, or a fourth as many token ids."""
    count, size, salt = order["count"], order["bytes"], order["salt"]
    if order["input"] == "ids":
        rng = random.Random(salt)
        rest = [rng.randrange(_VOCABULARY) for _ in range(max(1, size // 4))]
        return [[1 + number % _VOCABULARY, *rest[1:]] for number in range(count)]
    filler = (_WORDS * (size // len(_WORDS) + 1))[:size]
    return [f"{salt} {number} {filler}"[:size] for number in range(count)]


async def _prepare(sender: Sender, order: dict[str, Any]) -> dict[str, Any]:
    """Make the prompts of the next rush, so that their making is neither in its time nor in its CPU time."""
    sender.prepared = prompts_of(order)
    return {}


async def _rush(sender: Sender, order: dict[str, Any]) -> dict[str, Any]:
    prompts, sender.prepared = sender.prepared or prompts_of(order), []
    assert len(prompts) == order["count"]
    began_s = time.perf_counter()
    sent_s = await sender.rush(prompts)
    return {"enqueue_s": sent_s, "wall_s": time.perf_counter() - began_s}


async def _alone(sender: Sender, order: dict[str, Any]) -> dict[str, Any]:
    """One request at a time with a pause before each, kind by kind in turn."""
    found: dict[str, list[float]] = {what: [] for what in order["what"]}
    end_s = time.perf_counter() + order["most_s"]
    for number, prompt in enumerate(prompts_of(order)):
        if time.perf_counter() > end_s and all(found.values()):
            break
        await asyncio.sleep(order["pause_s"])
        what = order["what"][number % len(order["what"])]
        began_s = time.perf_counter()
        found[what].append((await sender.one(prompt, what=what) - began_s) * 1000)
    return {f"{what}_ms": values for what, values in found.items()}


async def _paced(sender: Sender, order: dict[str, Any]) -> dict[str, Any]:
    """Poisson arrivals at `rate_per_s`, whatever is still under way; times count from when each was due."""
    found: dict[str, list[float]] = {what: [] for what in order["what"]}
    late_ms: list[float] = []
    rng, due_s = random.Random(order["salt"]), time.perf_counter() + 0.05

    async def send(prompt: Any, what: str, due_s: float) -> None:
        late_ms.append((time.perf_counter() - due_s) * 1000)
        found[what].append((await sender.one(prompt, what=what) - due_s) * 1000)

    async with asyncio.TaskGroup() as group:
        for number, prompt in enumerate(prompts_of(order)):
            due_s += rng.expovariate(order["rate_per_s"])
            if (left_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(left_s)
            group.create_task(send(prompt, order["what"][number % len(order["what"])], due_s))
    return {**{f"{what}_ms": values for what, values in found.items()}, "late_ms": late_ms}


_ORDERS = {"prepare": _prepare, "rush": _rush, "alone": _alone, "paced": _paced}


async def _serve(sender: Sender) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    loop = asyncio.get_running_loop()
    await sender.open()
    versions = {name: version(name) for name in sender.packages}
    hello = {"versions": {"python": sys.version.split()[0], **versions}, "can_pace": sender.can_pace}
    print(json.dumps(hello), file=answers, flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        answer = await _ORDERS[order["do"]](sender, order)
        print(json.dumps(answer), file=answers, flush=True)
    await sender.close()


def serve(sender: Sender) -> None:
    """Obey orders until standard input ends."""
    run(_serve(sender), uses_uvloop=sender.uses_uvloop)
