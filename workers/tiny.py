"""A small random-weight Llama with a real tokenizer, built in seconds: `python -m workers.tiny DIR`.

For trying the pipeline without a model or a network. Its text is noise, its serving costs are real.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from l4queue.model_cache import build_in_place
from l4queue.tiny import CONTEXT_TOKENS, VOCABULARY, make_tiny_tokenizer

__all__ = ("build_tiny_model",)

_VERSION = "tiny-llama-1"


def build_tiny_model(directory: str | Path) -> Path:
    """Build the model below `directory` unless it is there already; returns its path.

    The same bytes on every machine of one kind: weights and tokenizer come from fixed seeds. Two processes at
    once build once.
    """

    def build(aside: Path) -> None:
        tokenizer = make_tiny_tokenizer()
        tokenizer.save_pretrained(aside)
        _build_weights(tokenizer).save_pretrained(aside)

    return build_in_place(Path(directory) / _VERSION, marker="model.safetensors", build=build)


def _build_weights(tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # The usual initialisation (0.02) repeats one token for ever, which hides errors of order and position.
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=()):  # the process's own random numbers are none of our business
        torch.manual_seed(20251219)
        return LlamaForCausalLM(config).to(torch.float32)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m workers.tiny DIR", file=sys.stderr)
        sys.exit(2)
    print("building a small random-weight Llama: its text is noise", file=sys.stderr)
    print(build_tiny_model(sys.argv[1]))
