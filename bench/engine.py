"""What the engine side of a worker can do without a model: `python -m bench.engine [DIR of a tokenizer]`.

The emulated engine at speed 0 (tokens and tiny requests per second, on one core) and, given a tokenizer, the
text of outputs (tokens per second with and without stop strings).
"""

from __future__ import annotations

import asyncio
import sys
import time

from l4queue.cost.step import StepCost
from l4queue.models import SamplingParams
from workers.engine.base import EngineRequest
from workers.engine.emulated.engine import EmulatedEngine
from workers.loop.text import text_factory

COST = StepCost(alpha_ms=5, beta_ms=0.1, gamma_ms=0.001, pi_ms=0.02, psi_ms=0.0001)


async def emulated(*, num_requests: int, prompt_tokens: int, max_tokens: int) -> float:
    """Seconds until all of these are through, 256 at once."""
    engine = EmulatedEngine(COST, speed=0)
    await engine.start()
    prompt, params = list(range(prompt_tokens)), SamplingParams()
    num_added = num_done = 0
    start_s = time.perf_counter()
    while num_done < num_requests:
        while num_added < num_requests and num_added - num_done < 256:
            num_added += 1
            await engine.add(
                EngineRequest(
                    request_id=str(num_added),
                    token_ids=prompt,
                    max_tokens=max_tokens,
                    min_tokens=0,
                    params=params,
                )
            )
        num_done += sum(output.finish_reason is not None for output in await engine.outputs())
    wall_s = time.perf_counter() - start_s
    await engine.stop()
    return wall_s


def text(directory: str, stop: tuple[str, ...]) -> float:
    """Tokens per second through `TextStream`, one at a time, on Python's own documentation."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    corpus = "".join(str(topics[name]) for name in sorted(topics))[:400_000]
    ids = AutoTokenizer.from_pretrained(directory).encode(corpus, add_special_tokens=False)
    stream = text_factory(directory)(SamplingParams(stop=stop))
    start_s = time.perf_counter()
    for token_id in ids:
        stream.feed((token_id,))
    return len(ids) / (time.perf_counter() - start_s)


def main() -> None:
    """Print the figures."""
    wall_s = asyncio.run(emulated(num_requests=1000, prompt_tokens=100, max_tokens=400))
    print(f"emulated, 256 at once, 400 tokens each: {1000 * 400 / wall_s:,.0f} tokens/s")
    wall_s = asyncio.run(emulated(num_requests=20_000, prompt_tokens=20, max_tokens=1))
    print(f"emulated, 1 token each: {20_000 / wall_s:,.0f} requests/s")
    if len(sys.argv) > 1:
        for stop in ((), ("\n\nQuestion:", "</answer>")):
            label = "with stop strings" if stop else "no stop strings"
            print(f"text, {label}: {text(sys.argv[1], stop):,.0f} tokens/s")


if __name__ == "__main__":
    main()
