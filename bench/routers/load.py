"""The load: the same arrivals for every entrant over HTTP, measured by the client that streams the answers."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import aiohttp
import numpy as np
from entrants import Entrant
from transformers import PreTrainedTokenizerBase

from l4queue.sim.results import Measured
from l4queue.sim.traces.trace import Trace

__all__ = ("prompts_of", "saturate", "serve")

_FIRST_ID = 300  # tokens before it are bytes and special ones
_TOTAL_S = 900.0  # for one answer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    first_s: float
    end_s: float
    prompt_tokens: int
    output_tokens: int


def prompts_of(trace: Trace, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> list[str]:
    """Texts of about the trace's lengths; others for every seed, so that no prefix cache knows them.

    Text, since not every router reads prompts of token ids.
    """
    rng = np.random.default_rng(seed)
    vocabulary = len(tokenizer)
    return [
        str(tokenizer.decode(rng.integers(_FIRST_ID, vocabulary, int(count)).tolist()))
        for count in trace.input_tokens
    ]


async def serve(entrant: Entrant, trace: Trace, prompts: list[str], *, model: str) -> tuple[Measured, float]:
    """Every request at its time, streamed; their measures, and how late the generator was at worst, s."""
    timeout, connector = aiohttp.ClientTimeout(total=_TOTAL_S), aiohttp.TCPConnector(limit=0)
    late_s = 0.0
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        began_s = time.perf_counter()
        tasks = []
        for at_s, output_tokens, prompt in zip(trace.arrival_s, trace.output_tokens, prompts, strict=True):
            await asyncio.sleep(max(0.0, began_s + float(at_s) - time.perf_counter()))
            late_s = max(late_s, time.perf_counter() - began_s - float(at_s))
            body = _body(model, prompt, int(output_tokens))
            tasks.append(asyncio.create_task(_answer(session, entrant, body)))
        answers = await asyncio.gather(*tasks)
    return _measured(trace, answers, began_s=began_s), late_s


async def saturate(entrant: Entrant, trace: Trace, prompts: list[str], *, model: str, num_at_once: int) -> float:
    """Requests per second with this many always under way."""
    waiting = iter(list(zip(trace.output_tokens, prompts, strict=True)))
    timeout = aiohttp.ClientTimeout(total=_TOTAL_S)
    ends_s: list[float] = []

    async def one_after_another(session: aiohttp.ClientSession) -> None:
        for output_tokens, prompt in waiting:
            ends_s.append((await _answer(session, entrant, _body(model, prompt, int(output_tokens)))).end_s)

    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one_after_another(session) for _ in range(num_at_once)))
    ends_s.sort()
    first, last = num_at_once, len(ends_s) - num_at_once  # without the fill and the drain
    return (last - first) / (ends_s[last] - ends_s[first])


def _body(model: str, prompt: str, output_tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _answer(session: aiohttp.ClientSession, entrant: Entrant, body: dict[str, object]) -> _Answer:
    first_s: float | None = None
    last = b""
    async with session.post(f"{entrant.url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{entrant.name} answers {answer.status}: {(await answer.text())[:300]}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                first_s = first_s or time.perf_counter()
                last = line
    end_s = time.perf_counter()
    usage = json.loads(last[6:])["usage"] if last else None
    if usage is None or usage["completion_tokens"] != body["max_tokens"]:
        raise RuntimeError(f"{entrant.name} ended a stream with {last!r}, not with all tokens")
    return _Answer(
        first_s=first_s or end_s,
        end_s=end_s,
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
    )


def _measured(trace: Trace, answers: list[_Answer], *, began_s: float) -> Measured:
    first, end = (np.array([getattr(a, name) for a in answers]) - began_s for name in ("first_s", "end_s"))
    output = np.array([a.output_tokens for a in answers], dtype=float)
    return Measured(
        arrival_s=trace.arrival_s,
        finish_s=end,
        e2e_s=end - trace.arrival_s,
        ttft_s=first - trace.arrival_s,
        tpot_s=(end - first) / np.maximum(output - 1, 1),
        prompt_tokens=np.array([a.prompt_tokens for a in answers], dtype=float),
        output_tokens=output,
    )
