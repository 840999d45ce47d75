"""Random-weight models with the shape of public ones, for timing: `python -m bench.gpu.model llama-3.1-8b DIR`.

What an engine step costs depends on the shapes of the weights, not on their values. The tokenizer is the small one
of `l4queue.tiny`; its text is noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from l4queue.model_cache import build_in_place
from l4queue.tiny import make_tiny_tokenizer

__all__ = ("SHAPES", "build_random_model", "kv_bytes_per_token")

# from the models' published config.json
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 16384,
        "max_position_embeddings": 16384,
    },
}


def kv_bytes_per_token(shape: str) -> int:
    """Bytes of one token's keys and values in 16 bits."""
    model = SHAPES[shape]
    head_size = model.get("head_dim", model["hidden_size"] // model["num_attention_heads"])
    return int(2 * model["num_hidden_layers"] * model["num_key_value_heads"] * head_size * 2)


def build_random_model(shape: str, directory: str | Path) -> Path:
    """Build it below `directory` unless it is there already, on the GPU if there is one; returns its path."""

    def build(aside: Path) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = make_tiny_tokenizer()
        config = LlamaConfig(
            **SHAPES[shape],
            rope_theta=500_000.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="bfloat16",
        )
        torch.manual_seed(20251219)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(aside, max_shard_size="4GB")
        tokenizer.save_pretrained(aside)

    return build_in_place(Path(directory) / f"random-{shape}", marker="tokenizer_config.json", build=build)


def main() -> None:
    """Build one and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    print(build_random_model(args.shape, args.directory))


if __name__ == "__main__":
    main()
