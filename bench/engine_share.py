"""Throughput of a vLLM worker against plain `AsyncLLM`: what the worker's loop takes from its engine.

    python bench/engine_share.py [--running 32] [--tokens 500] [--rounds 7] [--json]

Two engines are up, alike (the tiny model, options of a worker, one core for the model), each with one process
beside its engine core: the worker, and a loop of `AsyncLLM.generate`, one task for each request, at AsyncLLM's
defaults. In turn they decode `--running` requests to `--tokens` output tokens each. Both count whole rounds: from
the first request sent to the last one ended, which is through the client, Redis and the dispatcher for the worker.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from told import machine, tell
from worker_cpu import one_round

from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.client import AsyncClient

CORE = "0"  # of both models: rounds take turns
PROMPT = "hello world"


async def measure(*, num_running: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of both, and the ratios of the rounds, after one round each to warm up."""
    os.environ["L4_CPU_CORES"] = CORE
    with tempfile.TemporaryDirectory() as folder:
        options = StackOptions(workers=1, engine="vllm", model="tiny", flower=False, data_dir=Path(folder))
        async with Stack(options) as stack:
            await stack.ready()
            async with (
                AsyncClient(stack.redis_url, settings=stack.settings) as client,
                plain(stack.settings.model, num_running, num_tokens) as rate_of_plain,
            ):
                pairs = []
                for _ in range(rounds + 1):
                    ours = (await one_round(client, num_running, num_tokens))["tokens_per_s"]
                    pairs.append((ours, await rate_of_plain()))
    ratios = [ours / theirs for ours, theirs in pairs[1:]]
    return {
        "running": num_running,
        "tokens": num_tokens,
        "rounds": rounds,
        "worker_tokens_per_s": statistics.median(ours for ours, _ in pairs[1:]),
        "plain_tokens_per_s": statistics.median(theirs for _, theirs in pairs[1:]),
        "worker_to_plain": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "machine": machine(),
    }


@asynccontextmanager
async def plain(model: str, num_running: int, num_tokens: int) -> AsyncIterator[Any]:
    """A process with `AsyncLLM`; a call has it do a round and gives tokens per second."""
    arguments = [__file__, "--plain", model, "--running", str(num_running), "--tokens", str(num_tokens)]
    child = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    reader, writer = child.stdout, child.stdin

    async def round_of() -> float:
        writer.write(b"go\n")
        await writer.drain()
        while line := await reader.readline():
            if line.startswith(b"rate "):
                return float(line.split()[1])
        raise RuntimeError("plain AsyncLLM has ended")

    try:
        yield round_of
    finally:
        writer.close()
        await child.wait()


async def serve_rounds(model: str, num_running: int, num_tokens: int) -> None:
    """A round of plain AsyncLLM for every line of stdin."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from workers.engine.vllm.configure import VllmOptions, engine_config
    from workers.engine.vllm.environment import prepare_environment

    prepare_environment(kv_cache_gib=1, cores=CORE, model=model)
    options = VllmOptions(
        model=model,
        max_model_len=None,
        max_running=max(num_running, 64),
        dtype="auto",
        max_batched_tokens=None,
        tensor_parallel=1,
        gpu_memory_share=0.9,
        vllm_args="",
    )
    llm = AsyncLLM.from_vllm_config(engine_config(options))
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def decode(request_id: str) -> int:
        return sum([len(out.outputs[0].token_ids) async for out in llm.generate(PROMPT, params, request_id)])

    for number, _ in enumerate(iter(sys.stdin.readline, "")):
        started_s = time.perf_counter()
        counts = await asyncio.gather(*(decode(f"{number}.{index}") for index in range(num_running)))
        print(f"rate {sum(counts) / (time.perf_counter() - started_s)}", flush=True)
    llm.shutdown()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.plain:
        asyncio.run(serve_rounds(given.plain, given.running, given.tokens))
        return
    found = asyncio.run(measure(num_running=given.running, num_tokens=given.tokens, rounds=given.rounds))
    tell(found, as_json=given.json)


if __name__ == "__main__":
    main()
