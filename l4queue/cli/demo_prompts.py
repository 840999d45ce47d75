"""Prompts of mixed lengths for the demo: questions, and tasks on pages of Python's own documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
_TASK_TOKENS = 16
"""What a task in front of a text takes, at most, with the tokenizers tried."""
_QUESTION_TOKENS = 80
"""Prompts up to this length are questions without a text. Chosen: a shorter text says nothing."""
_QUESTIONS = (
    "What is the capital of France?",
    "Which planet is closest to the sun?",
    "Why is the sky blue?",
    "What do bees make?",
    "How many days are there in a week?",
    "What is a library?",
    "Name three primary colours.",
    "What is water made of?",
    "Who wrote Romeo and Juliet?",
    "What is the largest ocean on Earth?",
    "Why do leaves fall in autumn?",
    "What does a doctor do?",
    "How do birds fly?",
    "What is bread made from?",
    "Why do we sleep?",
    "What is the opposite of hot?",
    "Where do penguins live?",
    "What is a computer program?",
    "Write a sentence about the sea.",
    "Give me one tip for learning a language.",
    "What is the purpose of a bridge?",
    "What causes the tides?",
    "How does a bicycle stay upright?",
    "What is the boiling point of water?",
)
_TASKS = (
    "Say in one sentence what this text is about.",
    "Summarise this text in two sentences.",
    "Explain the main idea of this text to a beginner.",
)


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


def measured_chars_per_token(tokenizer: Any) -> float:
    """Characters of this text per token with a model's own tokenizer."""
    text = real_text()
    return len(text) / len(tokenizer(text, verbose=False)["input_ids"])


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
    """Many short questions, tasks on some pages, a few on long documents.

    Nine of ten prompts have log-uniform lengths below 1,024 tokens, the rest above, up to
    `max_prompt_tokens`; outputs are log-uniform. A target is met as far as `chars_per_token` fits the tokenizer;
    questions are shorter than theirs.
    """
    text = real_text()
    prompts = []
    for _ in range(num_prompts):
        is_long = rng.random() < share_long
        low, high = (1024, max_prompt_tokens) if is_long else (min_tokens, min(1024, max_prompt_tokens))
        target = int(np.exp(rng.uniform(np.log(low), np.log(high))))
        output = int(np.exp(rng.uniform(np.log(min_output), np.log(max_output + 1))))
        asked = _question(rng) if target < _QUESTION_TOKENS else _task(text, target, chars_per_token, rng)
        prompts.append(Prompt(text=asked, target_tokens=target, max_tokens=min(max_output, output)))
    return prompts


def _question(rng: np.random.Generator) -> str:
    return _QUESTIONS[int(rng.integers(len(_QUESTIONS)))]


def _task(text: str, target_tokens: int, chars_per_token: float, rng: np.random.Generator) -> str:
    size = int((target_tokens - _TASK_TOKENS) * chars_per_token)
    start = int(rng.integers(0, max(1, len(text) - size)))
    paragraph = text.find("\n\n", start, start + size // 4)
    window = text[start : start + size] if paragraph < 0 else text[paragraph + 2 : paragraph + 2 + size]
    return f"{_TASKS[int(rng.integers(len(_TASKS)))]}\n\n{window.strip()}"
