"""A running vLLM engine as tests use it, and what transformers says of the same model."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest

from l4queue.models import SamplingParams
from l4queue.protocol.records import TokenLogprobs
from workers.engine.base import EngineDied, EngineInfo, EngineOutput, EngineRequest
from workers.engine.vllm.engine import VllmEngine

__all__ = (
    "EOS_PROMPT",
    "GREEDY",
    "Served",
    "expect_death",
    "prompt",
    "reference",
    "reference_logprobs",
    "signal_core",
)

EOS_PROMPT = list(range(300, 340))
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Token ids that no other seed gives."""
    return [int(token) for token in np.random.default_rng(seed).integers(10, 8000, num_tokens)]


def reference(model: Path, ids: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        out = llama.generate(
            torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=2
        )
    return [int(token) for token in out[0][len(ids) :]]


def reference_logprobs(model: Path, ids: list[int], output: list[int]) -> list[list[float]]:
    """The logprob of every token of the vocabulary at each place of an output, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        logits = llama(torch.tensor([ids + output])).logits[0, len(ids) - 1 : -1]
        return [[float(value) for value in row] for row in torch.log_softmax(logits, dim=-1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The running engine."""

    engine: VllmEngine
    info: EngineInfo
    expected: list[int]
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # of what was collected

    async def add(
        self,
        name: str,
        ids: list[int],
        max_tokens: int,
        *,
        params: SamplingParams = GREEDY,
        priority: int = 0,
        min_tokens: int = 0,
    ) -> None:
        """Start a request."""
        self.logprobs[name] = []
        await self.engine.add(
            EngineRequest(
                request_id=name,
                token_ids=ids,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                params=params,
                priority=priority,
            )
        )

    async def collect(self, names: Iterable[str]) -> dict[str, tuple[list[int], EngineOutput]]:
        """Wait for the end of these; the tokens and the last output of each, in order of their ends."""
        left = {name: list[int]() for name in names}
        ended: dict[str, tuple[list[int], EngineOutput]] = {}
        while left:
            for output in await self.engine.outputs():
                tokens = left[output.request_id]
                tokens.extend(output.token_ids)
                self.logprobs[output.request_id].extend(output.logprobs)
                if output.finish_reason is not None:
                    ended[output.request_id] = (left.pop(output.request_id), output)
        return ended

    async def one(self, ids: list[int], max_tokens: int, **more: object) -> tuple[list[int], EngineOutput]:
        """A request alone."""
        await self.add("one", ids, max_tokens, **more)  # type: ignore[arg-type]
        return (await self.collect(["one"]))["one"]


def signal_core(number: signal.Signals) -> None:
    """Send a signal to vLLM's engine core, a child of this process."""
    cores = [child for child in psutil.Process().children(recursive=True) if "EngineCore" in child.name()]
    assert cores
    for core in cores:
        core.send_signal(number)


async def expect_death(served: Served) -> None:
    """Running requests get no outcome: they are the worker's to give back. It stays dead."""

    async def until_death() -> None:
        while True:
            assert all(output.finish_reason is None for output in await served.engine.outputs())

    with pytest.raises(EngineDied):
        async with asyncio.timeout(300):
            await until_death()
    with pytest.raises(EngineDied):
        await served.engine.outputs()
    with pytest.raises(EngineDied):
        await served.add("late", [1], 1)
