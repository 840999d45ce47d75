"""Redis' work for fleets of many workers, idle and at the same load of each: what a request costs as they grow.

    python bench/fleet.py [--workers 16,64,256] [--rate 1.0] [--tokens 1] [--speed 0] [--seconds 15] [--json]

Every process is real: redis-server, dispatcher, planner, beat, and whole workers with the emulated engine, many to
a process. Requests come at random, `--rate` a second for each worker, each by itself from one client that awaits
its result. Commands are counted by MONITOR in a stretch of their own, those inside scripts apart; nothing is timed
meanwhile. A request's commands are those of the load without those of the idle fleet, per request. Times of
requests are Redis' own: from acceptance to outcome.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from told import machine

from l4queue.cli.bench.queue.counts import commands_of, look, spent
from l4queue.cli.bench.queue.raw import RawConnection
from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.client import AsyncClient
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from l4queue.protocol.scripts import all_scripts

MOST_IN_PROCESS = 64
"""Workers of one process. Chosen: a process for each would need more memory than two cores usually have."""
SETTLING_S = 5.0  # after the last worker has registered: the planner's first plan, first looks
MOST_SHOWN = 16  # kinds of commands in the answer, the most frequent first


class Load:
    """One client that sends requests at random and awaits each of them."""

    def __init__(self, client: AsyncClient, *, rate: float, num_tokens: int) -> None:
        self._client = client
        self._rate = rate
        self._num_tokens = num_tokens
        self._rng = random.Random(7)
        self.num_sent = 0

    async def for_seconds(self, duration_s: float) -> int:
        """Send for so long, wait for all; how many."""
        before, loop = self.num_sent, asyncio.get_running_loop()
        end_s, due_s = loop.time() + duration_s, loop.time()
        async with asyncio.TaskGroup() as group:
            while (due_s := due_s + self._rng.expovariate(self._rate)) < end_s:
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                group.create_task(self._one())
        return self.num_sent - before

    async def _one(self) -> None:
        self.num_sent += 1
        handle = await self._client.enqueue("hello world", max_tokens=self._num_tokens, ignore_eos=True)
        await handle.result()


async def measure(num_workers: int, given: argparse.Namespace) -> dict[str, Any]:
    """One fleet: idle, then under load; each once timed and once counted."""
    with tempfile.TemporaryDirectory() as folder:
        options = StackOptions(
            workers=num_workers,
            workers_per_process=min(num_workers, MOST_IN_PROCESS),
            engine="emulated",
            model="tiny",
            flower=False,
            data_dir=Path(folder),
            quiet=True,
        )
        async with Stack(options) as stack:
            await stack.ready()
            redis = await RawConnection.open(stack.redis_url)
            executor = AsyncExecutor(stack.redis_url)
            reads = Reads(Keys(stack.settings.namespace))
            await until_registered(executor, reads, num_workers)
            await asyncio.sleep(SETTLING_S)
            pids = {
                name: [child.pid] for name, child in stack.supervisor.children.items() if child.pid is not None
            }
            async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
                load = Load(client, rate=given.rate * num_workers, num_tokens=given.tokens)
                idle = await stretch(redis, pids, stack.redis_url, asyncio.sleep, given.seconds)
                await load.for_seconds(min(3.0, given.seconds))
                last_id = await executor.run(reads.last_finished_id())
                busy = await stretch(redis, pids, stack.redis_url, load.for_seconds, given.seconds)
                _, finished = await executor.run(reads.finished_after(last_id, count=10**6))
            await executor.close()
            await redis.close()
            stack.kill()
    took_ms = [one.finished_ms - one.submitted_ms for one in finished]
    per_s = given.rate * num_workers
    return {
        "workers": num_workers,
        "requests_per_s": per_s,
        "idle": idle,
        "load": busy,
        "commands_per_request": (busy["commands_per_s"] - idle["commands_per_s"]) / busy["requests_per_s"],
        "inner_per_request": (busy["inner_per_s"] - idle["inner_per_s"]) / busy["requests_per_s"],
        "redis_cpu_ms_per_request": (busy["redis_cores"] - idle["redis_cores"]) / per_s * 1000,
        "mean_ms": statistics.mean(took_ms),
        "p50_ms": statistics.median(took_ms),
        "states": sorted({one.state for one in finished}),
    }


async def until_registered(executor: AsyncExecutor, reads: Reads, num_workers: int) -> None:
    """Wait until this number of workers has a lease."""
    while len(await executor.run(reads.incarnations())) < num_workers:  # noqa: ASYNC110 - Redis tells nobody
        await asyncio.sleep(0.5)


async def stretch(redis: RawConnection, pids: Any, url: Any, work: Any, duration_s: float) -> dict[str, Any]:
    """CPU of Redis and of all while this work is done, then commands while it is done again."""
    before = await look(redis, pids)
    await work(duration_s)
    found = spent(before, await look(redis, pids))
    began_s = time.monotonic()
    scripts = {one.sha: one.name for one in all_scripts()}
    sent, inside, num_requests = await commands_of(url, work(duration_s), scripts=scripts)
    wall_s = time.monotonic() - began_s
    return {
        "commands_per_s": sent.total() / wall_s,
        "inner_per_s": inside.total() / wall_s,
        "requests_per_s": (num_requests or 0) / wall_s,
        "redis_cores": found.cpu_s["redis"] / found.wall_s,
        "workers_cores": sum(s for name, s in found.cpu_s.items() if "worker" in name) / found.wall_s,
        "foreign_cores": found.foreign_cores,
        "redis_out_bytes_per_s": found.bytes_out / found.wall_s,
        "sent_per_s": {name: round(n / wall_s, 1) for name, n in sent.most_common(MOST_SHOWN)},
    }


def line(found: dict[str, Any]) -> str:
    """The figures of a fleet as a row of a table."""
    idle, load = found["idle"], found["load"]
    cells = (
        f"{found['workers']:,}",
        f"{idle['commands_per_s']:,.0f} + {idle['inner_per_s']:,.0f}",
        f"{idle['redis_cores'] * 100:.1f} %",
        f"{load['commands_per_s']:,.0f} + {load['inner_per_s']:,.0f}",
        f"{load['redis_cores'] * 100:.1f} %",
        f"{found['commands_per_request']:.1f} + {found['inner_per_request']:.0f}",
        f"{found['mean_ms']:.1f} / {found['p50_ms']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure fleet after fleet and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", default="16,64,256", help="sizes of fleets")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second for each worker")
    parser.add_argument("--tokens", type=int, default=1, help="output tokens of a request")
    parser.add_argument("--speed", type=float, default=0.0, help="of the emulated engine; 0: it takes no time")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each stretch")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    os.environ["L4_EMULATED_SPEED"] = str(given.speed)
    found = [asyncio.run(measure(int(number), given)) for number in given.workers.split(",")]
    if given.json:
        print(json.dumps({"machine": machine(), "rate": given.rate, "tokens": given.tokens, "fleets": found}))
        return
    print(
        "| workers | idle: commands/s, top-level + inner | Redis | loaded | Redis | a request | ms, mean / p50 |"
    )
    print("|---|---|---|---|---|---|---|")
    for one in found:
        print(line(one))


if __name__ == "__main__":
    main()
