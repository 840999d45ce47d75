"""`l4queue stats --watch` on a real terminal of 80 columns, before a deployment that serves and moves requests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l4queue.models import StagePlan
from tests.protocol.server import RedisServer
from tests.services.pipeline import COST, Pipeline, open_pipeline, true, until
from tests.services.terminal import Terminal

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

L4QUEUE = str(Path(sys.executable).with_name("l4queue"))
CROWDED = replace(COST, alpha_ms=4.0, beta_ms=2.0, pi_ms=0.0001)
"""Every request in a batch costs the others a lot, a prefill next to nothing: moving pays at once."""
ENTER, LEAVE, SHOW_CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


@asynccontextmanager
async def deployment(url: str, namespace: str) -> AsyncIterator[Pipeline]:
    """Two stages with a worker each, and requests without end, of which some outgrow the first."""
    async with open_pipeline(url, namespace, lease_s=2.0, durability="strict") as pipeline:
        for name in ("short-0", "long-0"):
            pipeline.start(name, speed=1.0, cost=CROWDED)
        stages = ((0, 100, ("short-0",)), (100, None, ("long-0",)))
        await pipeline.publish(
            *(
                StagePlan(low_tokens=low, high_tokens=high, num_workers=1, worker_ids=ids)
                for low, high, ids in stages
            )
        )
        load = asyncio.create_task(_load(pipeline))
        try:
            yield pipeline
        finally:
            load.cancel()
            await asyncio.wait({load})


async def _load(pipeline: Pipeline) -> None:
    for number in range(1_000_000):
        prompt = "a" * (60 if number % 3 else 300)
        await pipeline.client.enqueue(prompt=prompt, max_tokens=70, ignore_eos=True)
        await asyncio.sleep(0.2)  # the rate of arrivals, not a wait


def environment(url: str, namespace: str) -> dict[str, str]:
    """Of a shell in which the deployment's address is set, and nothing else of ours."""
    ours = {"L4_REDIS_URL": url, "L4_NAMESPACE": namespace}
    theirs = {k: v for k, v in os.environ.items() if not k.startswith("L4_")}
    return {k: v for k, v in theirs.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | ours


@contextmanager
def watching(url: str, namespace: str, *, columns: int = 80, rows: int = 30) -> Iterator[Terminal]:
    """The live view on a terminal of this size."""
    command = [L4QUEUE, "stats", "--watch", "--interval", "0.3"]
    terminal = Terminal(command, columns=columns, rows=rows, environment=environment(url, namespace))
    try:
        yield terminal
    finally:
        terminal.close()


async def shown(terminal: Terminal, *texts: str) -> None:
    """Wait until all texts are on the screen."""
    try:
        await until(lambda: true(terminal.shows(*texts)), timeout_s=120)
    except TimeoutError:
        screen = "\n".join(terminal.lines)
        raise AssertionError(f"{texts} did not all come onto the screen:\n{screen}") from None


def figures(terminal: Terminal, row: str) -> list[str]:
    """The cells of the first row that begins with this text; cells are two blanks apart."""
    line = next(line for line in terminal.lines if line.startswith(row))
    return re.split(r"\s{2,}", line)


async def test_it_shows_stages_latencies_workers_and_moves_in_80_columns(
    durable_server: RedisServer, namespace: str
) -> None:
    """Nothing is cut off, and Ctrl-C puts the terminal back as it was."""
    async with deployment(durable_server.url, namespace):
        with watching(durable_server.url, namespace) as terminal:
            await shown(terminal, "short-0", "long-0", "0–100", "100–∞", "hand-over ", "short-0 → long-0")
            moved = re.compile(r"hand-overs [1-9]\d*/[1-9]")  # since the first look, and in all
            await until(lambda: true(moved.search("\n".join(terminal.lines)) is not None), timeout_s=120)
            await until(lambda: true(figures(terminal, "all")[2] != "–"), timeout_s=120)

            lines = terminal.lines
            assert not any("…" in line for line in lines), "\n".join(lines)
            assert lines[0].startswith(f"l4queue {namespace} · redis://127.0.0.1:")
            done, *latencies = figures(terminal, "all")[1:]
            assert int(done) > 0
            assert len(latencies) == 6
            assert all(re.fullmatch(r"[\d.]+ (ms|s)", cell) for cell in latencies)
            assert re.search(r"in [\d.]+/s  done [\d.]+/s  out [\d.]+k? tok/s  live \d+", lines[2])
            assert ENTER in terminal.raw

            terminal.type(b"\x03")
            assert await asyncio.to_thread(terminal.process.wait, 20) == 0
            await until(lambda: true(terminal.raw.endswith(SHOW_CURSOR + LEAVE)))
            assert b"Traceback" not in terminal.raw


async def test_it_fits_itself_to_a_window_that_changes(durable_server: RedisServer, namespace: str) -> None:
    """Wider: more of each worker. Lower: workers give way, and it says how many."""
    async with deployment(durable_server.url, namespace) as pipeline:
        for number in range(6):
            pipeline.start(f"more-{number}", speed=1.0, cost=CROWDED)
        with watching(durable_server.url, namespace, rows=40) as terminal:
            await shown(terminal, "short-0", "long-0", "more-5")
            assert not terminal.shows("preempted")

            terminal.resize(120, 40)
            await shown(terminal, "preempted", "more-5")

            terminal.resize(80, 18)
            await shown(terminal, " more ")
            # a screen may be seen while it is drawn: the rest of it comes
            await until(lambda: true(any("moved" in line for line in terminal.lines[-3:-1])), timeout_s=120)
            await until(lambda: true(terminal.lines[0].startswith("l4queue ")), timeout_s=120)


async def test_it_outlives_an_outage_of_redis_and_says_so(durable_server: RedisServer, namespace: str) -> None:
    """The last figures stay, marked as old; when Redis is back, so is the view. SIGTERM ends it well."""
    async with deployment(durable_server.url, namespace):
        with watching(durable_server.url, namespace) as terminal:
            await shown(terminal, "short-0", "long-0")

            durable_server.kill()
            await shown(terminal, "cannot be reached", "as of ", "short-0")

            durable_server.start()
            await until(lambda: true(not terminal.shows("as of ")), timeout_s=120)
            await shown(terminal, "short-0", "long-0")

            terminal.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(terminal.process.wait, 10) == 0
            await until(lambda: true(LEAVE in terminal.raw))


async def test_it_waits_for_a_redis_that_is_not_there_yet(durable_server: RedisServer, namespace: str) -> None:
    """Started before the deployment, it shows it once it is there."""
    durable_server.kill()
    with watching(durable_server.url, namespace) as terminal:
        await shown(terminal, "cannot be reached", "Tried again")

        durable_server.start()
        await shown(terminal, "plan 0", "no worker serves")


async def test_as_json_it_prints_a_line_for_each_look_also_of_an_outage(
    durable_server: RedisServer, namespace: str
) -> None:
    """For programs: sums of stages, latencies, moves."""
    command = [L4QUEUE, "stats", "--watch", "--json", "--interval", "0.2"]
    async with deployment(durable_server.url, namespace):
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=subprocess.PIPE,
            env=environment(durable_server.url, namespace),
            limit=2**20,
        )
        assert process.stdout is not None

        async def line(wanted: Any) -> dict[str, Any]:
            async with asyncio.timeout(300):
                while True:
                    told: dict[str, Any] = json.loads(await process.stdout.readline())  # type: ignore[union-attr]
                    if wanted(told):
                        return told

        found = await line(lambda told: told.get("moves") and told["latencies"][0]["e2e_ms"])
        found = await line(lambda told: told["rates"]["done_per_s"])  # a second look gives rates
        stage = found["stages"][0]
        assert [stage["stage"]["low_tokens"], stage["stage"]["high_tokens"]] == [0, 100]
        assert stage["num_slots"] == 16
        assert [worker["worker_id"] for worker in stage["workers"]] == ["short-0"]
        assert found["rates"]["accepted_per_s"] > 0
        assert {move["kind"] for move in found["moves"]} <= {"hand-over", "escape", "steal", "stolen"}
        assert found["latencies"][-1]["num_requests"] >= found["latencies"][0]["num_requests"]

        durable_server.kill()
        gone = await line(lambda told: told.get("away_s", 0) > 0.3)
        assert "cannot be reached" in gone["error"]["message"]
        durable_server.start()
        assert (await line(lambda told: "error" not in told))["counts"]["done"] >= found["counts"]["done"]

        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0


def test_without_a_terminal_it_says_what_to_do(redis_url: str, namespace: str) -> None:
    """A pipe has no screen."""
    done = subprocess.run(
        [L4QUEUE, "stats", "--watch"],
        env=environment(redis_url, namespace),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr == "error: --watch draws on a terminal; for programs use --json --watch\n"
