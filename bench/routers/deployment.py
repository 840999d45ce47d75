"""Two vLLM engines behind every router, two more behind each l4queue, all up at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrants import Entrant, engine_spec, router_specs

from l4queue.cli.stack.embedded import free_port
from l4queue.cli.stack.logs import FileLog
from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.cli.stack.supervisor import Supervisor
from l4queue.model_cache import cache_directory
from workers.tiny import build_tiny_model

__all__ = ("MAX_MODEL_LEN", "MODEL", "Deployment", "deployed")

MODEL = "tiny"
MAX_MODEL_LEN, MAX_SEQS, MAX_BATCHED_TOKENS = 8192, 128, 2048  # the last two: vLLM's own for a server on CPUs
_TELL_CACHED = "--enable-prompt-tokens-details"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """All entrants, those of l4queue last; the Redis of each of these; the tokenizer of their model."""

    entrants: list[Entrant]
    redis_urls: Mapping[str, str]
    tokenizer: Any


@asynccontextmanager
async def deployed(
    routers: Sequence[str], ours: Mapping[str, Mapping[str, str]], folder: Path
) -> AsyncIterator[Deployment]:
    """Everything up. `routers` are `ROUTER:POLICY`, `ours` the deployments of l4queue by name.

    A deployment's environment stays for those after it: each names all variables in which they differ.
    """
    from transformers import AutoTokenizer

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # no engine stays behind
    model = build_tiny_model(cache_directory())
    ports = [free_port(), free_port()]
    options = ["--served-model-name", MODEL, "--max-model-len", str(MAX_MODEL_LEN), _TELL_CACHED]
    options += ["--max-num-seqs", str(MAX_SEQS), "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
    peers = Supervisor(log=FileLog(folder / "peers", notes=sys.stderr))
    limits = {"MAX_MODEL_LEN": MAX_MODEL_LEN, "MAX_RUNNING": MAX_SEQS, "MAX_BATCHED_TOKENS": MAX_BATCHED_TOKENS}
    os.environ |= {f"L4_{name}": str(value) for name, value in limits.items()}
    os.environ |= {"L4_DTYPE": "float32", "L4_VLLM_ARGS": _TELL_CACHED}
    async with AsyncExitStack() as stacks:
        stacks.push_async_callback(peers.stop)
        for index, port in enumerate(ports):
            peers.add(engine_spec(index, model=model, port=port, options=options))
        await peers.ready()
        engines = [f"http://127.0.0.1:{port}" for port in ports]
        specs, entrants = router_specs(engines, list(routers), cache=cache_directory())
        for spec in specs:
            peers.add(spec)
        await peers.ready()
        redis_urls = {}
        for name, environment in ours.items():
            os.environ |= environment
            place = folder / name.replace(":", "-")
            setting = StackOptions(workers=2, engine="vllm", model=MODEL, flower=False, http=True, data_dir=place)
            stack = await stacks.enter_async_context(Stack(setting))
            await stack.ready()
            entrants.append(Entrant(name=name, url=str(stack.openai_url).removesuffix("/v1")))
            redis_urls[name] = stack.redis_url
        yield Deployment(entrants=entrants, redis_urls=redis_urls, tokenizer=AutoTokenizer.from_pretrained(model))
