"""Flower beside many requests: its memory, how long its pages take, whether its totals are right.

    python bench/flower_scale.py [--requests 100000] [--workers 2] [--window 10000] [--json]

Every process is real: redis-server, dispatcher, planner, beat, Flower as `l4queue up` starts it, and Celery
workers with the emulated engine at speed 0. Each request has a two-word prompt and one output token. While they
are served, the pages are asked for again and again, the list of tasks as a browser asks for it. At the end three
totals are compared: of Redis, of Flower's workers page, and of the workers themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from told import machine

from l4queue.cli.stack.embedded import free_port
from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.client import AsyncClient

CHUNK = 1_000
RESULT_TTL_S = "120"
"""How long results are kept: the memory of Redis is not what is measured here."""
TOTALS_S = 30.0
"""Within which Flower must have the last totals."""
COLUMNS = ["name", "uuid", "state", "args", "result", "received", "runtime", "worker"]


class Looks:
    """Asks for Flower's pages in a thread of its own, as somebody would who watches, and notes what it costs."""

    def __init__(self, url: str, pid: int, *, pause_s: float) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)
        self._process = psutil.Process(pid)
        self._pause_s = pause_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.started_s = time.monotonic()
        self.memory: list[tuple[float, int]] = []
        self.cpu_s = 0.0
        self.page_s: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def end(self) -> None:
        """Look a last time and stop."""
        self._ending.set()
        self._thread.join()

    def workers(self) -> list[dict[str, Any]]:
        """The rows of the workers page."""
        return list(
            self._timed("/workers?json=1", lambda: self._http.get("/workers", params={"json": "1"}))["data"]
        )

    def stats(self, node: str) -> dict[str, Any]:
        """What a worker says of itself, asked through Flower."""
        reply = self._http.get("/api/workers", params={"refresh": "1", "workername": node})
        return dict(reply.json()[node].get("stats", {}))

    def tasks(self, search: str = "") -> dict[str, Any]:
        """The first page of the list of tasks, newest first: the request that its JavaScript makes."""
        form = {"draw": 1, "start": 0, "length": 15, "search[value]": search}
        form |= {"order[0][column]": COLUMNS.index("received"), "order[0][dir]": "desc"}
        form |= {f"columns[{i}][data]": name for i, name in enumerate(COLUMNS)}
        name = "/tasks, list" + (f", search {search}" if search else "")
        return dict(self._timed(name, lambda: self._http.post("/tasks/datatable", data=form)))

    def look(self) -> None:
        """Each page once."""
        at_s = time.monotonic() - self.started_s
        self.memory.append((at_s, self._process.memory_info().rss))
        self.cpu_s = sum(self._process.cpu_times()[:2])
        for path in ("/workers", "/tasks"):
            self._timed(path, lambda path=path: self._http.get(path))
        self.workers()
        rows = self.tasks()["data"]
        self.tasks("kwargs:stage=0")
        self.tasks("one tokens")
        if rows:
            path = f"/task/{rows[0]['uuid']}"
            self._timed("/task/<id>", lambda: self._http.get(path), may_miss=True)

    def _timed(self, name: str, ask: Callable[[], httpx.Response], *, may_miss: bool = False) -> Any:
        started_s = time.perf_counter()
        reply = ask()
        if not (may_miss and reply.status_code == 404):
            reply.raise_for_status()
        self.page_s[name].append(time.perf_counter() - started_s)
        return reply.json() if "json" in reply.headers.get("content-type", "") else reply.text

    def _run(self) -> None:
        while not self._ending.wait(self._pause_s):
            self.look()
        self.look()


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One run: everything started, all requests served, pages looked at, totals compared."""
    os.environ |= {"L4_EMULATED_SPEED": "0", "L4_RESULT_TTL_S": RESULT_TTL_S}
    with tempfile.TemporaryDirectory() as folder:
        options = StackOptions(
            workers=given.workers,
            engine="emulated",
            model="tiny",
            durability=given.durability,
            data_dir=Path(folder),
            flower_port=free_port(),
        )
        async with Stack(options) as stack:
            await stack.ready()
            assert stack.flower_url is not None
            pid = stack.supervisor.children["flower"].pid
            assert pid is not None
            looks = Looks(stack.flower_url, pid, pause_s=given.pause)
            empty_bytes = psutil.Process(pid).memory_info().rss
            looks.start()
            async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
                started_s = time.perf_counter()
                counts, sent = await serve(client, given)
                wall_s = time.perf_counter() - started_s
                await asyncio.to_thread(looks.end)
                totals = await compare(looks, counts["done"])
    return report(given, looks, totals, sent=sent, wall_s=wall_s, empty_bytes=empty_bytes)


async def serve(client: AsyncClient, given: argparse.Namespace) -> tuple[dict[str, int], int]:
    """Enqueue all, at most `window` of them unfinished at a time; the counts when all have ended, and how many.

    After `most_s` seconds no more are enqueued.
    """
    sent, num_requests, said_s = 0, given.requests, time.monotonic()
    until_s = time.monotonic() + given.most_s
    while True:
        if time.monotonic() > until_s:
            num_requests = sent
        counts = (await client.overview()).counts
        if sent == num_requests and not counts.get("live", 0):
            return counts, sent
        if time.monotonic() - said_s > 10:
            said_s = time.monotonic()
            print(f"{counts.get('done', 0):>9,} of {num_requests:,} done", file=sys.stderr, flush=True)
        if sent < num_requests and counts.get("live", 0) + CHUNK <= given.window:
            size = min(CHUNK, num_requests - sent)
            await client.enqueue_many(["hello world"] * size, max_tokens=1)
            sent += size
        else:
            await asyncio.sleep(0.02)


async def compare(looks: Looks, done: int) -> dict[str, Any]:
    """Succeeded by Redis, by Flower's workers page (which may lag a little), and by the workers."""
    started_s = time.monotonic()
    while True:
        rows = [row for row in await asyncio.to_thread(looks.workers) if row["hostname"].startswith("worker-")]
        flower = sum(int(row.get("task-succeeded", 0)) for row in rows)
        if flower == done or time.monotonic() - started_s > TOTALS_S:
            break
        await asyncio.sleep(0.2)
    stats = [looks.stats(row["hostname"]) for row in rows]
    names = ("events_sent", "events_left_out", "events_dropped", "events_waiting", "events_outages")
    return {
        "redis": done,
        "flower": flower,
        "flower_lag_s": round(time.monotonic() - started_s, 2),
        "workers": sum(int(one["finished"]) for one in stats),
        "tasks_remembered": looks.tasks()["recordsTotal"],
        **{name: sum(int(one[name]) for one in stats) for name in names},
    }


def report(
    given: argparse.Namespace,
    looks: Looks,
    totals: dict[str, Any],
    *,
    sent: int,
    wall_s: float,
    empty_bytes: int,
) -> dict[str, Any]:
    """What was found, for people and programs."""
    thinned = looks.memory[:: max(1, len(looks.memory) // 20)]
    return {
        "requests": sent,
        "workers": given.workers,
        "wall_s": round(wall_s, 1),
        "requests_per_s": round(sent / wall_s, 1),
        "totals": totals,
        "flower_cpu_s": round(looks.cpu_s, 1),
        "memory_mb_empty": round(empty_bytes / 1e6),
        "memory_mb_most": round(max(rss for _, rss in looks.memory) / 1e6),
        "memory_mb_last": round(looks.memory[-1][1] / 1e6),
        "memory_mb_by_s": [(round(at_s), round(rss / 1e6)) for at_s, rss in thinned],
        "page_ms": {
            name: {
                "n": len(found),
                "median": round(statistics.median(found) * 1000),
                "most": round(max(found) * 1000),
            }
            for name, found in looks.page_s.items()
        },
        "machine": machine(),
    }


def main() -> None:
    """Measure, print, and fail when the totals differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--window", type=int, default=10_000, help="most unfinished requests at a time")
    parser.add_argument("--most-s", type=float, default=3600.0, help="stop enqueueing after this time, s")
    parser.add_argument("--pause", type=float, default=5.0, help="between two rounds of pages, s")
    parser.add_argument("--durability", choices=("strict", "fast"), default="strict")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = asyncio.run(measure(given))
    print(json.dumps(found) if given.json else json.dumps(found, indent=1))
    if not found["totals"]["redis"] == found["totals"]["flower"] == found["requests"]:
        raise SystemExit("the totals differ")


if __name__ == "__main__":
    main()
