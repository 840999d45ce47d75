"""The tokenizer of the tiny model, built in seconds without torch, and its atomic installation."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ("VOCABULARY", "build_in_place", "build_tiny_tokenizer", "cache_directory", "make_tiny_tokenizer")

VOCABULARY = 8192  # tokens; enough for the help texts it is trained on, and quick to train
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def cache_directory() -> Path:
    """Where tiny models are kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l4queue"


def build_tiny_tokenizer(directory: str | Path) -> Path:
    """Build the tokenizer alone below `directory` unless it is there already; returns its path."""
    return build_in_place(
        Path(directory) / "tiny-tokenizer-1",
        marker="tokenizer_config.json",
        build=lambda aside: make_tiny_tokenizer().save_pretrained(aside),
    )


def build_in_place(target: Path, *, marker: str, build: Callable[[Path], object]) -> Path:
    """Have `build` fill a directory that becomes `target`, unless that has its `marker` file already.

    Two builders at once are harmless: each builds aside and the first one to finish moves its copy into place.
    """
    if (target / marker).exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        build(aside)
        aside.chmod(0o755)  # made for its owner alone, used by every process of the machine
        try:
            aside.rename(target)
        except OSError:  # another builder was first
            if not (target / marker).exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


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
        model_max_length=16_384,
    )
