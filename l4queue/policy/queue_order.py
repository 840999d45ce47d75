"""The serving order inside a queue, as one static score per request: lower is served first."""

from __future__ import annotations

__all__ = ("longest_overtaking_ms", "score")


def score(
    arrival_ms: float,
    prompt_tokens: int,
    *,
    ageing_tokens_per_s: float,
    priority: int = 0,
    priority_step_s: float = 30.0,
) -> float:
    """arrival_ms + prompt_tokens · ms_per_token + priority · step, in ms.

    Shortest prompt first with linear ageing orders by prompt_tokens - rate·waiting. All waiting requests age
    at the same rate, so the order of two never changes and the arrival time can stand for the age: with
    ms_per_token = 1000/ageing_tokens_per_s the score is fixed at arrival and fits a sorted set.

    Nobody starves: x is served after y only if score(x) > score(y). A request that arrives later than
    arrival(x) + prompt(x)·ms_per_token + (priority(x) - priority(y))·step has a score above that of x whatever
    its prompt, so x is overtaken only by what arrives within that time (`longest_overtaking_ms`), a finite set.
    Lower priority values are served first, as in vLLM; each class is a head start of `priority_step_s`.
    """
    return arrival_ms + prompt_tokens * (1000.0 / ageing_tokens_per_s) + priority * priority_step_s * 1000.0


def longest_overtaking_ms(
    prompt_tokens: int,
    *,
    ageing_tokens_per_s: float,
    priority: int = 0,
    best_priority: int = 0,
    priority_step_s: float = 30.0,
) -> float:
    """For how long after its arrival others may still arrive that are served before this request, ms."""
    head_start_ms = max(0, priority - best_priority) * priority_step_s * 1000.0
    return prompt_tokens * (1000.0 / ageing_tokens_per_s) + head_start_ms
