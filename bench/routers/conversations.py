"""Conversations: users who answer what the model said, each turn with the whole history before it.

Starts of conversations and lengths are the same for every entrant, all text is new for each run. A follow-up comes
a think time after the answer before it, as it does with people, so a slow entrant gets it later.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from affinity_live import between
from entrants import Entrant
from transformers import PreTrainedTokenizerBase

__all__ = ("Conversation", "Exchange", "converse", "draw", "figures_of_exchanges")

MEAN_TURNS = 5.0
MEAN_THINK_S = 3.0
NUM_SYSTEMS = 6
SYSTEM_TOKENS, MESSAGE_TOKENS, OUTPUT_TOKENS = (400, 1200), (100, 1200), (16, 48)
"""Shortest and longest, log-uniform between: what two CPU engines serve a few of in a second."""
_FIRST_ID = 300  # tokens before it are bytes and special ones
_TOTAL_S = 900.0  # for one answer
_SPARE_TOKENS = 512  # of the context: text does not always have as many tokens as were drawn for it

Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    message: str
    output_tokens: int
    think_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a user will say, whatever the answers are; `begin_s` from the start of the run."""

    begin_s: float
    system: str
    turns: tuple[_Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One turn as its client saw it; times in s from the start of the run. `turn` is 0 for the first."""

    session: int
    turn: int
    sent_s: float
    first_s: float
    end_s: float
    chat: Chat
    answer: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


def draw(
    tokenizer: PreTrainedTokenizerBase, *, rate_rps: float, duration_s: float, seed: int, text_seed: int
) -> list[Conversation]:
    """Conversations that make about `rate_rps` turns per second, of all ages from a few of them on."""
    rng, words = np.random.default_rng(seed), np.random.default_rng(text_seed)

    def text(bounds: tuple[int, int]) -> str:
        return str(tokenizer.decode(words.integers(_FIRST_ID, len(tokenizer), between(rng, *bounds)).tolist()))

    systems = [text(SYSTEM_TOKENS) for _ in range(NUM_SYSTEMS)]
    popularity = 1.0 / np.arange(1, NUM_SYSTEMS + 1)
    count = int(rng.poisson(rate_rps / MEAN_TURNS * duration_s)) or 1
    return [
        Conversation(
            begin_s=float(begin_s),
            system=systems[int(rng.choice(NUM_SYSTEMS, p=popularity / popularity.sum()))],
            turns=tuple(
                _Turn(
                    message=text(MESSAGE_TOKENS),
                    output_tokens=between(rng, *OUTPUT_TOKENS),
                    think_s=float(rng.exponential(MEAN_THINK_S)),
                )
                for _ in range(int(rng.geometric(1 / MEAN_TURNS)))
            ),
        )
        for begin_s in np.sort(rng.uniform(0.0, duration_s, count))
    ]


async def converse(
    entrant: Entrant, conversations: Sequence[Conversation], *, model: str, until_s: float, most_tokens: int
) -> list[Exchange]:
    """All turns that are sent before `until_s`. A conversation ends early where the context would not hold it."""
    timeout, connector = aiohttp.ClientTimeout(total=_TOTAL_S), aiohttp.TCPConnector(limit=0)
    exchanges: list[Exchange] = []
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        began_s = time.perf_counter()

        async def hold(session: int, conversation: Conversation) -> None:
            await asyncio.sleep(max(0.0, conversation.begin_s - (time.perf_counter() - began_s)))
            chat = [{"role": "system", "content": conversation.system}]
            for number, turn in enumerate(conversation.turns):
                if time.perf_counter() - began_s >= until_s:
                    return
                chat = [*chat, {"role": "user", "content": turn.message}]
                one = await _exchange(
                    http, entrant, chat, turn, model=model, began_s=began_s, at=(session, number)
                )
                exchanges.append(one)
                if one.prompt_tokens + one.output_tokens + MESSAGE_TOKENS[1] + _SPARE_TOKENS > most_tokens:
                    return
                chat = [*chat, {"role": "assistant", "content": one.answer}]
                await asyncio.sleep(turn.think_s)

        await asyncio.gather(*(hold(number, one) for number, one in enumerate(conversations)))
    return sorted(exchanges, key=lambda exchange: exchange.sent_s)


async def _exchange(
    http: aiohttp.ClientSession,
    entrant: Entrant,
    chat: Chat,
    turn: _Turn,
    *,
    model: str,
    began_s: float,
    at: tuple[int, int],
) -> Exchange:
    body = {
        "model": model,
        "messages": chat,
        "max_tokens": turn.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent_s, first_s = time.perf_counter(), None
    lines: list[bytes] = []
    async with http.post(f"{entrant.url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{entrant.name} answers {answer.status}: {(await answer.text())[:300]}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                lines.append(line)
                if first_s is None and b'"finish_reason"' in line and b'"role"' not in line:
                    first_s = time.perf_counter()
    end_s = time.perf_counter()
    events = [json.loads(line[6:]) for line in lines]
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    if usage is None or usage["completion_tokens"] != turn.output_tokens:
        raise RuntimeError(f"{entrant.name} ended a stream with {lines[-1:]}, not with all tokens")
    return Exchange(
        session=at[0],
        turn=at[1],
        sent_s=sent_s - began_s,
        first_s=(first_s or end_s) - began_s,
        end_s=end_s - began_s,
        chat=chat,
        answer="".join(_pieces(events)),
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        output_tokens=usage["completion_tokens"],
    )


def _pieces(events: Sequence[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def figures_of_exchanges(exchanges: Sequence[Exchange], *, warmup_s: float) -> dict[str, float]:
    """What clients see of the turns that were sent after the warm-up: times in s, and shares of prompt tokens."""
    kept = [one for one in exchanges if one.sent_s >= warmup_s]
    later = [one for one in kept if one.turn]
    e2e_s = [one.end_s - one.sent_s for one in kept]
    tpot_s = [(one.end_s - one.first_s) / max(one.output_tokens - 1, 1) for one in kept]
    return {
        "num": len(kept),
        "mean_s": float(np.mean(e2e_s)),
        "p50_s": float(np.median(e2e_s)),
        "p99_s": float(np.quantile(e2e_s, 0.99)),
        "ttft_s": float(np.mean([one.first_s - one.sent_s for one in kept])),
        "followup_ttft_s": float(np.mean([one.first_s - one.sent_s for one in later])),
        "tpot_s": float(np.mean(tpot_s)),
        "cached": sum(one.cached_tokens for one in kept) / sum(one.prompt_tokens for one in kept),
        "cached_later": sum(one.cached_tokens for one in later) / sum(one.prompt_tokens for one in later),
    }
