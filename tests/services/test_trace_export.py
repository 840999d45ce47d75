"""`l4queue trace export` on a live deployment: simulate and plan by its own traffic."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from l4queue.policy.prefix_blocks import BLOCK_TOKENS
from l4queue.sim.traces.trace import read_trace
from tests.protocol.server import RedisServer
from tests.services.pipeline import COST, Pipeline, open_pipeline, true, until
from tests.services.terminal import Terminal
from tests.services.test_stats_watch import environment
from workers.engine.emulated.engine import EmulatedEngine

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

L4QUEUE = str(Path(sys.executable).with_name("l4queue"))
PROMPTS = (30, 5, 200, 60)


async def command(url: str, namespace: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    process = await asyncio.create_subprocess_exec(
        L4QUEUE,
        *arguments,
        env=environment(url, namespace),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def serve(pipeline: Pipeline) -> None:
    """A request of each length, one after the other, each with other outputs."""
    for number, length in enumerate(PROMPTS):
        handle = await pipeline.client.enqueue("a" * length, max_tokens=3 + number, ignore_eos=True)
        await handle.result()


async def test_traffic_becomes_a_trace_to_simulate_and_plan_with(
    durable_server: RedisServer, namespace: str, tmp_path: Path
) -> None:
    """Lengths and order are those of the requests; `--coefficients live` is the cost that a worker tells."""
    url, path = durable_server.url, tmp_path / "traffic.csv.gz"
    async with open_pipeline(url, namespace) as pipeline:
        code, _, error = await command(url, namespace, "trace", "export", str(path))
        assert (code, path.exists()) == (1, False), error
        assert "nothing to export yet" in error

        pipeline.start("w-0")
        await serve(pipeline)
        code, _, error = await command(url, namespace, "trace", "export", str(path))
        assert code == 0, error
        assert "4 requests" in error
        trace = read_trace(path)
        assert trace.input_tokens.tolist() == list(PROMPTS)
        assert trace.output_tokens.tolist() == [3, 4, 5, 6]
        assert trace.arrival_s[0] == 0.0

        code, out, error = await command(url, namespace, "trace", "export", "--last", "3600")
        assert (code, len(out.splitlines())) == (0, 5), error

        while not any((await pipeline.client.overview()).costs):  # told once it has seen enough steps
            await serve(pipeline)
        for name in ("simulate", "plan solve"):
            arguments = (*name.split(), str(path), "--instances", "2", "--coefficients", "live", "--json")
            code, out, error = await command(url, namespace, *arguments)
            assert code == 0, out + error
            told: dict[str, Any] = json.loads(out)
            if name == "simulate":
                cost = told["setting"]["cost"]
                assert cost["kv_capacity_tokens"] == COST.kv_capacity_tokens
                assert cost["alpha_ms"] == pytest.approx(COST.alpha_ms, rel=0.05)
                assert told["setting"]["costs"] == "measured by 1 live workers"


async def test_reuse_of_prefixes_is_replayed_from_ones_own_traffic(
    durable_server: RedisServer, namespace: str, tmp_path: Path
) -> None:
    """Follow-ups of a conversation: as many cached tokens in simulation as the engine found, to a block."""
    url, path, said = durable_server.url, tmp_path / "traffic.csv", "All that was said before. " * 20
    async with open_pipeline(url, namespace, prefix_affinity="true") as pipeline:
        pipeline.start("w-0", make_engine=partial(EmulatedEngine, has_prefix_cache=True))
        found = []
        for turn in ("", "And then?", "And after that, what else was there to be said of it?"):
            handle = await pipeline.client.enqueue(said + turn, max_tokens=4, ignore_eos=True)
            found.append(await handle.result())
        code, _, error = await command(url, namespace, "trace", "export", str(path))
        assert (code, "--hash-block-tokens 128" in error) == (0, True), error
    arguments = ("--hash-block-tokens", "128", "--instances", "1", "--policy", "round-robin", "--json")
    code, out, error = await command(url, namespace, "simulate", str(path), *arguments)
    assert code == 0, out + error
    (result,) = json.loads(out)["results"]
    prompts = sum(one.prompt_tokens for one in found)
    cached = sum(one.cached_tokens or 0 for one in found)
    assert cached > prompts / 2
    assert result["cached_share"] * prompts == pytest.approx(cached, abs=3 * BLOCK_TOKENS)
    assert said[:20] not in path.read_text()


async def test_following_goes_on_until_it_is_stopped(
    durable_server: RedisServer, namespace: str, tmp_path: Path
) -> None:
    """On a terminal it counts; what ended meanwhile is in the file after Ctrl-C, with exit code 0."""
    url, path = durable_server.url, tmp_path / "traffic.csv"
    async with open_pipeline(url, namespace) as pipeline:
        pipeline.start("w-0")
        await serve(pipeline)
        terminal = Terminal(
            [L4QUEUE, "trace", "export", "--follow", str(path)],
            columns=80,
            rows=10,
            environment=environment(url, namespace),
        )
        try:
            await until(lambda: true(terminal.shows("requests", "4/")))
            await serve(pipeline)
            await until(lambda: true(terminal.shows("8/")))
            terminal.type(b"\x03")
            assert await asyncio.to_thread(terminal.process.wait) == 0
        finally:
            terminal.close()
    assert read_trace(path).input_tokens.tolist() == list(PROMPTS) * 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("trace", "export", "--follow"), "--follow needs a file"),
        (("simulate", "--workload", "chat", "--coefficients", "live"), "no worker runs here"),
        (("simulate", "--workload", "chat", "--coefficients", "none.json"), "none.json cannot be read"),
        (("plan", "solve", "--workload", "chat", "--coefficients", "live", "--gpu", "h100"), "excludes --gpu"),
    ],
)
async def test_what_cannot_be_done_is_said(
    durable_server: RedisServer, namespace: str, arguments: tuple[str, ...], why: str
) -> None:
    """One line, with what to do; exit code 1."""
    code, _, error = await command(durable_server.url, namespace, *arguments)
    assert (code, why in error) == (1, True), error
