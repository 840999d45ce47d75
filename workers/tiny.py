"""A small random-weight Llama with a real tokenizer, built in seconds: `python -m workers.tiny DIR`.

For trying the pipeline without a model or a network. Its text is noise, its serving costs are real.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ("build_tiny_model",)

_VERSION = "tiny-llama-1"
_VOCABULARY = 8192
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny_model(directory: str | Path) -> Path:
    """Build the model below `directory` unless it is there already; returns its path.

    The same bytes on every machine of one kind: weights and tokenizer come from fixed seeds. Two builders at
    once are harmless: each builds aside and the first one to finish moves its copy into place.
    """
    root = Path(directory)
    target = root / _VERSION
    if (target / "model.safetensors").exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{_VERSION}-", dir=root))
    try:
        tokenizer = _build_tokenizer()
        tokenizer.save_pretrained(aside)
        _build_weights(tokenizer).save_pretrained(aside)
        aside.chmod(0o755)  # made for its owner alone, used by every worker of the machine
        try:
            aside.rename(target)
        except OSError:  # another builder was first
            if not (target / "model.safetensors").exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _build_tokenizer() -> Any:
    from pydoc_data.topics import topics  # text that every Python carries

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((str(topics[name]) for name in sorted(topics)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=16_384,
    )


def _build_weights(tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # The usual initialisation (0.02) repeats one token for ever, which hides errors of order and position.
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
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
