"""Real prompts of mixed lengths for the demo: windows of the documentation that every Python carries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l4queue.pretrained import load_tokenizer

__all__ = (
    "CHARS_PER_TOKEN",
    "LENGTH_CLASSES",
    "LengthClass",
    "Prompt",
    "length_class",
    "measured_chars_per_token",
    "mixed_prompts",
    "real_text",
)

CHARS_PER_TOKEN = 3.0
"""Characters of this text per token, at least, with the tokenizers tried (3.1 to 4.5)."""
_NUMBER_TOKENS = 4  # what the number in front of each prompt takes


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthClass:
    """A name for prompts below `high_tokens` (and not in a smaller class)."""

    name: str
    high_tokens: int


LENGTH_CLASSES = (
    LengthClass(name="short", high_tokens=256),
    LengthClass(name="medium", high_tokens=2048),
    LengthClass(name="long", high_tokens=1_000_000_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of the workload; `target_tokens` is the length it was cut for, an upper bound."""

    text: str
    target_tokens: int
    max_tokens: int


def length_class(prompt_tokens: int) -> LengthClass:
    """The class of a counted prompt."""
    return next(c for c in LENGTH_CLASSES if prompt_tokens < c.high_tokens)


def real_text() -> str:
    """About 700 kB of English prose and code: the language reference that ships with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(str(topics[name]) for name in sorted(topics))


def measured_chars_per_token(tokenizer_path: str) -> float:
    """Characters of this text per token with a model's own tokenizer; needs transformers."""
    text = real_text()
    return len(text) / len(load_tokenizer(tokenizer_path)(text, verbose=False)["input_ids"])


def mixed_prompts(
    num_prompts: int,
    *,
    rng: np.random.Generator,
    min_tokens: int = 20,
    max_prompt_tokens: int = 8000,
    min_output: int = 8,
    max_output: int = 256,
    share_long: float = 0.1,
    chars_per_token: float = CHARS_PER_TOKEN,
) -> list[Prompt]:
    """Many short questions, some pages, a few long documents; each starts with its own number.

    Nine of ten prompts have log-uniform lengths below 1,024 tokens, the rest above, up to
    `max_prompt_tokens`; outputs are log-uniform. A target is met as far as `chars_per_token` fits the tokenizer.
    """
    text = real_text()
    prompts = []
    for number in range(num_prompts):
        is_long = rng.random() < share_long
        low, high = (1024, max_prompt_tokens) if is_long else (min_tokens, min(1024, max_prompt_tokens))
        target = int(np.exp(rng.uniform(np.log(low), np.log(high))))
        size = max(1, int((target - _NUMBER_TOKENS) * chars_per_token))
        start = int(rng.integers(0, max(1, len(text) - size)))
        window = text[start : start + size]
        output = int(np.exp(rng.uniform(np.log(min_output), np.log(max_output + 1))))
        prompts.append(
            Prompt(text=f"({number}) {window}", target_tokens=target, max_tokens=min(max_output, output))
        )
    return prompts
