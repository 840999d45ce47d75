"""The tokenizer of the tiny model, built in seconds without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4queue.model_cache import build_in_place

__all__ = ("CONTEXT_TOKENS", "TINY", "VOCABULARY", "build_tiny_tokenizer", "make_tiny_tokenizer")

TINY = "tiny"

VOCABULARY = 8192  # tokens; enough for the help texts it is trained on, and quick to train
CONTEXT_TOKENS = 16_384  # longest prompt + output of the tiny model
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny_tokenizer(directory: str | Path) -> Path:
    """Build the tokenizer alone below `directory` unless it is there already; returns its path."""
    return build_in_place(
        Path(directory) / "tiny-tokenizer-1",
        marker="tokenizer_config.json",
        build=lambda aside: make_tiny_tokenizer().save_pretrained(aside),
    )


def make_tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template, trained on text that every Python carries."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
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
        model_max_length=CONTEXT_TOKENS,
    )
