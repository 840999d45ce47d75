"""The serving order inside a queue, as one static score per request: lower is served first."""

from __future__ import annotations

from l4queue.cost.step import BatchShape, StepCost

__all__ = ("BACKGROUND", "ageing_tokens_per_s", "background_overdue_ms", "in_class", "score")

_AGEING_SHARE = 1 / 30
"""Share of an engine's prefill rate: a prompt is set back by thirty times its own prefill. On simulated H100s
(56,000 tokens/s) rates from 200 to 5,000 make no difference; from 20,000 on the mean TTFT is 1.2 to 2.7 times as
long, as in order of arrival."""
_LEAST_STEP_MS = 1e-3  # of a cost model whose steps take no time: its rate is then as good as unbounded

BACKGROUND = 2.0**50
"""Added to the score of background requests. It is far beyond any clock, and leaves eighths of a ms exact."""


def ageing_tokens_per_s(cost: StepCost, *, given: float | None = None) -> float:
    """Prompt tokens that a second of waiting counts as: those given, else a thirtieth of an engine's prefill rate.

    That rate is the tokens of full steps of short prompts, by the cost model in force. Live and simulated alike.
    """
    if given is not None:
        return given
    step_ms = cost.step_ms(BatchShape(prefill_tokens=cost.max_batched_tokens))
    return _AGEING_SHARE * 1000.0 * cost.max_batched_tokens / max(step_ms, _LEAST_STEP_MS)


def in_class(score: float, *, priority: int, background_priority: int) -> float:
    """The score that carries the class: BACKGROUND more for a request of `background_priority` or beyond.

    So the two classes lie apart in one sorted set, and a worker that takes none of the background looks at none.
    The order among what may be taken is that of the scores without it.
    """
    return score + BACKGROUND if priority >= background_priority else score


def background_overdue_ms(starvation_bound_s: float) -> float:
    """How long after its score a background request counts as any other, so that the bound holds for it, too.

    Its score is at most half the bound after its arrival. What arrives the whole bound later finds it overdue, and
    of a higher score is served after it.
    """
    return starvation_bound_s * 500.0


def score(
    arrival_ms: float,
    prompt_tokens: int,
    *,
    ageing_tokens_per_s: float,
    priority: int = 0,
    priority_step_s: float = 30.0,
    starvation_bound_s: float = 600.0,
) -> float:
    """arrival_ms + prompt_tokens · ms_per_token + priority · step, in ms; what is added at most half the bound.

    Shortest prompt first with linear ageing orders by prompt_tokens - rate·waiting. All waiting requests age
    at the same rate, so the order of two never changes and the arrival time can stand for the age: with
    ms_per_token = 1000/ageing_tokens_per_s the score is fixed at arrival and fits a sorted set.

    Nobody starves: x is served after y only if score(x) > score(y). A request that arrives later than
    arrival(x) + prompt(x)·ms_per_token + (priority(x) - priority(y))·step has a score above that of x whatever
    its prompt, so x is overtaken only by what arrives within that time, a finite set. The rate is that of x's
    arrival: another rate later changes the scores of what comes then, and a prompt only ever adds to a score.
    Of two requests with different rates the order is that of their scores, no longer that of their ages.
    Lower priority values are served first, as in vLLM; each class is a head start of `priority_step_s`.

    Background requests (`in_class`) may be passed over for as long as others come, but not beyond the bound.

    The bound holds for every pair: nothing that arrives `starvation_bound_s` later is served first, however
    long the prompt or low the class, since no offset lies outside ± half the bound.
    """
    return arrival_ms + _offset_ms(
        prompt_tokens, priority, ageing_tokens_per_s, priority_step_s, starvation_bound_s
    )


def _offset_ms(
    prompt_tokens: int, priority: int, ageing_tokens_per_s: float, priority_step_s: float, bound_s: float
) -> float:
    offset_ms = prompt_tokens * (1000.0 / ageing_tokens_per_s) + priority * priority_step_s * 1000.0
    half_ms = bound_s * 500.0
    return max(-half_ms, min(half_ms, offset_ms))
