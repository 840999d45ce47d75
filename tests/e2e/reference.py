"""Greedy outputs of one plain `vllm.LLM`: requests as JSON on standard input, token ids as JSON to a file."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Arguments: model directory, longest length, output file."""
    model, max_model_len, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    requests = json.load(sys.stdin)

    from vllm import LLM, SamplingParams

    llm = LLM(model=model, max_model_len=max_model_len, dtype="float32", enforce_eager=True)
    params = [SamplingParams(temperature=0.0, max_tokens=r["max_tokens"]) for r in requests]
    outputs = llm.generate([r["prompt"] for r in requests], params, use_tqdm=False)
    with open(out, "w", encoding="utf-8") as file:
        json.dump(
            [[list(o.prompt_token_ids), list(o.outputs[0].token_ids), o.outputs[0].text] for o in outputs], file
        )


if __name__ == "__main__":
    main()
