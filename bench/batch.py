"""Batches under kills, at size, and beside interactive traffic; every process is real.

    python bench/batch.py kills [--lines 100000]      two SIGKILL of the client, one of a worker: nothing lost
    python bench/batch.py memory [--lines 1000000]    peak memory of the client
    python bench/batch.py latency [--seconds 60]      interactive latency without and with a batch running

The engine is the emulated one: without model time for `kills` and `memory`, at an H100's times for `latency`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from told import machine

from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.client import AsyncClient, Result

L4QUEUE = Path(sys.executable).with_name("l4queue")
SEED = 5


def write_lines(path: Path, num_lines: int, *, words: int = 8, max_tokens: int = 1) -> None:
    """A batch file: two thirds chats, one third completions."""
    text = " ".join(f"word{i}" for i in range(words))
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_lines):
            if i % 3 == 2:
                url, body = "/v1/completions", {"prompt": f"{i} {text}", "max_tokens": max_tokens}
            else:
                messages = [{"role": "user", "content": f"{i} {text}"}]
                url, body = "/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens}
            line = {"custom_id": f"line-{i}", "method": "POST", "url": url, "body": body}
            file.write(json.dumps(line) + "\n")


class Batch:
    """`l4queue enqueue --jsonl` as a process of its own."""

    def __init__(self, folder: Path, redis_url: str, *options: str) -> None:
        self.folder, self.out = folder, folder / "out.jsonl"
        self._options = options
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("L4_")}
        self._environment["L4_REDIS_URL"] = redis_url

    def start(self) -> subprocess.Popen[bytes]:
        """The same command each time."""
        command = [str(L4QUEUE), "enqueue", "--jsonl", "in.jsonl", "--out", "out.jsonl", "--json", *self._options]
        with (self.folder / "summary.json").open("wb") as summary:
            return subprocess.Popen(command, cwd=self.folder, env=self._environment, stdout=summary)

    def summary(self) -> dict[str, Any]:
        """Of the last run that ended by itself."""
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    def num_answers(self) -> int:
        """Lines in the output file now."""
        return self.out.read_bytes().count(b"\n") if self.out.exists() else 0

    def custom_ids(self) -> Counter[str]:
        """How often each custom_id has an answer or an error."""
        counts: Counter[str] = Counter()
        for name in ("out.jsonl", "out.jsonl.errors.jsonl"):
            with (self.folder / name).open("rb") as file:
                counts.update(json.loads(line)["custom_id"] for line in file)
        return counts


async def reached(batch: Batch, process: subprocess.Popen[bytes], number: int) -> None:
    """Return once the output has this many lines."""
    while batch.num_answers() < number:
        assert process.poll() is None, "the batch ended early"
        await asyncio.sleep(0.1)


async def ended(process: subprocess.Popen[bytes], watch: Callable[[], None] = lambda: None) -> int:
    """The exit code, once it has ended."""
    while (code := process.poll()) is None:
        watch()
        await asyncio.sleep(0.2)
    return code


async def kills(stack: Stack, folder: Path, *, num_lines: int) -> dict[str, Any]:
    """Kill the client at a fifth and at three fifths, a worker in between; count what came out."""
    write_lines(folder / "in.jsonl", num_lines)
    batch = Batch(folder, stack.redis_url)
    started_s = time.perf_counter()
    process = batch.start()
    for part, what in ((0.2, "client"), (0.4, "worker"), (0.6, "client")):
        await reached(batch, process, int(part * num_lines))
        if what == "worker":
            os.kill(stack.supervisor.children["worker-0"].pid, signal.SIGKILL)
            continue
        process.kill()
        process.wait()
        process = batch.start()
    code = await ended(process)
    wall_s = time.perf_counter() - started_s
    counts = batch.custom_ids()
    async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
        totals = (await client.overview()).counts
    return {
        "num_lines": num_lines,
        "exit_code": code,
        "wall_s": wall_s,
        "lines_per_s": num_lines / wall_s,
        "custom_ids": len(counts),
        "answered_once": sum(1 for number in counts.values() if number == 1),
        "answered_more_than_once": sum(1 for number in counts.values() if number > 1),
        "enqueued": totals["submitted"],
        "last_run": batch.summary(),
    }


async def memory(stack: Stack, folder: Path, *, num_lines: int) -> dict[str, Any]:
    """Peak memory of the client, of Redis beside it, and the rate."""
    write_lines(folder / "in.jsonl", num_lines)
    batch = Batch(folder, stack.redis_url)
    peaks, parts = {"client": 0, "redis": 0}, dict[int, float]()
    started_s = time.perf_counter()
    process = batch.start()
    pids = {"client": process.pid, "redis": stack.supervisor.children["redis"].pid}
    answers = Lines(batch.out)

    def watch() -> None:
        for name, pid in pids.items():
            peaks[name] = max(peaks[name], resident_bytes(pid))
        percent = 100 * answers.count() // num_lines
        parts.update(
            {at: peaks["client"] / 2**20 for at in (10, 25, 50, 75, 99) if at <= percent and at not in parts}
        )

    code = await ended(process, watch)
    return {
        "num_lines": num_lines,
        "input_bytes": (folder / "in.jsonl").stat().st_size,
        "exit_code": code,
        "wall_s": time.perf_counter() - started_s,
        "peak_client_mib_at_percent": parts,
        "peak_client_mib": peaks["client"] / 2**20,
        "peak_redis_mib": peaks["redis"] / 2**20,
        "last_run": batch.summary(),
    }


class Lines:
    """Counts the lines of a file that grows, reading each byte once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._count = path, 0, 0

    def count(self) -> int:
        """Lines by now."""
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while chunk := file.read(1 << 20):
                self._count += chunk.count(b"\n")
                self._offset += len(chunk)
        return self._count


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 once it has gone."""
    try:
        text = Path(f"/proc/{pid}/statm").read_text()
    except OSError:
        return 0
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def latency(stack: Stack, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The same interactive arrivals without and with a batch that never ends meanwhile.

    `first_10_s` are the first requests after a time in which the batch had the workers for itself.
    """
    seconds, rate, options = given.seconds, given.rate, given.option
    write_lines(folder / "in.jsonl", 200_000, words=given.batch_words, max_tokens=given.batch_tokens)
    found: dict[str, Any] = {"seconds": seconds, "rate_per_s": rate, "options": list(options)}
    async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
        await interactive(client, seconds=10.0, rate=rate)
        found["without"] = spread(await interactive(client, seconds=seconds, rate=rate))
        batch = Batch(folder, stack.redis_url, *options)
        process = batch.start()
        await reached(batch, process, 64)
        await asyncio.sleep(stack.settings.background_quiet_s + 5.0)  # it opens up, as overnight
        found["batch_alone_lines_per_s"] = await pace(batch, 20.0)
        found["first_10_s"] = spread(await interactive(client, seconds=10.0, rate=rate))
        before, started_s = batch.num_answers(), time.perf_counter()
        found["with"] = spread(await interactive(client, seconds=seconds, rate=rate))
        found["batch_lines_per_s"] = (batch.num_answers() - before) / (time.perf_counter() - started_s)
        process.send_signal(signal.SIGTERM)
        found["exit_code"] = await ended(process)
    found["ratio"] = {k: found["with"][k] / found["without"][k] for k in found["with"] if k.endswith("_ms")}
    return found


async def pace(batch: Batch, seconds: float) -> float:
    """Lines a second by now."""
    before, started_s = batch.num_answers(), time.perf_counter()
    await asyncio.sleep(seconds)
    return (batch.num_answers() - before) / (time.perf_counter() - started_s)


async def interactive(client: AsyncClient, *, seconds: float, rate: float) -> list[Result]:
    """Poisson arrivals of chats: 20 to 2,000 prompt tokens, 20 to 300 generated, the same ones each time."""
    rng = np.random.default_rng(SEED)
    tasks = []
    ends_s = time.perf_counter() + seconds
    while time.perf_counter() < ends_s:
        prompt = "word " * int(np.exp(rng.uniform(np.log(10), np.log(700))))
        output = int(np.exp(rng.uniform(np.log(20), np.log(300))))
        tasks.append(asyncio.create_task(one(client, prompt, output)))
        await asyncio.sleep(float(rng.exponential(1 / rate)))
    return list(await asyncio.gather(*tasks))


async def one(client: AsyncClient, prompt: str, max_tokens: int) -> Result:
    """One interactive request."""
    return await (await client.enqueue(prompt, max_tokens=max_tokens)).result(timeout=300)


def spread(results: Sequence[Result]) -> dict[str, Any]:
    """Quantiles by the server's clock."""
    first_ms = np.array([r.ttft_s for r in results if r.ttft_s is not None]) * 1000
    end_ms = np.array([r.e2e_s for r in results]) * 1000
    token_ms = np.array([r.tpot_s for r in results if r.tpot_s is not None]) * 1000
    return {
        "num_requests": len(results),
        **{f"ttft_p{q}_ms": float(np.percentile(first_ms, q)) for q in (50, 99)},
        **{f"tpot_p{q}_ms": float(np.percentile(token_ms, q)) for q in (50, 99)},
        **{f"e2e_p{q}_ms": float(np.percentile(end_ms, q)) for q in (50, 99)},
    }


@contextmanager
def environment(**values: str) -> Any:
    """Settings for the processes that are started within."""
    os.environ.update({f"L4_{name.upper()}": value for name, value in values.items()})
    try:
        yield
    finally:
        for name in values:
            del os.environ[f"L4_{name.upper()}"]


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Start a deployment and run what was asked for in it."""
    speed = "1" if given.what == "latency" else "0"
    changes = {"emulated_speed": speed}
    if given.unheld:
        changes["background_priority"] = "1000"  # nothing is background: as before there was such a class
    with tempfile.TemporaryDirectory() as place, environment(**changes):
        folder = Path(place)
        options = StackOptions(
            workers=given.workers, engine="emulated", model="tiny", flower=False, data_dir=folder, quiet=True
        )
        async with Stack(options) as stack:
            await stack.ready()
            if given.what == "kills":
                found = await kills(stack, folder, num_lines=given.lines or 100_000)
            elif given.what == "memory":
                found = await memory(stack, folder, num_lines=given.lines or 1_000_000)
            else:
                found = await latency(stack, folder, given)
    case = {"what": given.what, "workers": given.workers, "unheld": given.unheld}
    return {**case, **found, "machine": machine()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "memory", "latency"))
    parser.add_argument("--lines", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=6.0, help="interactive requests per second")
    parser.add_argument("--batch-words", type=int, default=150, help="words of a prompt of the batch")
    parser.add_argument("--batch-tokens", type=int, default=200, help="tokens that each line generates")
    parser.add_argument("--unheld", action="store_true", help="workers do not hold the batch back")
    parser.add_argument("--option", action="append", default=[], help="passed to the batch command")
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
