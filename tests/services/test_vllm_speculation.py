"""A vLLM engine that speculates: the same tokens, and steps that say how many each request gained."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4queue.models import SamplingParams
from tests.services.served import Served, reference
from workers.engine.vllm.engine import VllmEngine
from workers.tiny import build_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
PROMPT, NUM_TOKENS = [7, 8, 9] * 30, 600
NGRAMS = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}'


async def test_drafted_tokens_are_those_of_the_model_and_are_counted(tmp_path: Path) -> None:
    """Greedy: what transformers generate. Steps tell how many tokens each gave, and their sum is all of them."""
    model = build_tiny_model(tmp_path)
    engine = VllmEngine(
        str(model),
        max_model_len=1024,
        max_running=4,
        dtype="float32",
        max_batched_tokens=512,
        vllm_args=f"--speculative-config '{NGRAMS}'",
    )
    info = await engine.start()
    served = Served(engine=engine, info=info, expected=[])
    try:
        tokens, _ = await served.one(PROMPT, NUM_TOKENS)
        records = engine.step_records()
        _, refused = await served.one(PROMPT, 5, params=SamplingParams(min_p=0.1))
    finally:
        await engine.stop()
    assert refused.error
    assert "min_p" in refused.error
    assert tokens == reference(model, PROMPT, NUM_TOKENS)
    gained = sum(record.num_decodes * record.tokens_per_decode for record in records)
    assert gained == pytest.approx(NUM_TOKENS - 1, abs=4)  # the first is the prompt's, the last may have more
    assert max(record.tokens_per_decode for record in records) > 1
    assert all(record.prefill_tokens == 0 for record in records[1:])
