"""The workload: request n of a seed, what is asked of it, and the output that it must have."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from workers.engine.emulated.scheduler import next_token

__all__ = ("MAX_LEN", "Wish", "expected", "wish")

MAX_LEN = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One request. `cancel_after` tokens its client cancels it; a wish that is too long must be refused."""

    n: int
    prompt: str
    max_tokens: int
    cancel_after: int | None = None
    deadline_s: float | None = None
    is_pinned: bool = False
    is_too_long: bool = False

    def options(self) -> dict[str, Any]:
        """Arguments of `enqueue`. The same for every attempt: the key makes it one request."""
        given: dict[str, Any] = {"max_tokens": self.max_tokens, "ignore_eos": True}
        given |= {"idempotency_key": f"wish-{self.n}", "metadata": {"n": self.n}}
        if self.deadline_s is not None:
            given["deadline_s"] = self.deadline_s
        if self.is_pinned:
            given["presence_penalty"] = 0.5
        return given


def wish(seed: int, n: int) -> Wish:
    """Request n: mostly short, some long, some that outgrow every range, some that end early."""
    rng = random.Random(f"{seed}-{n}")
    low, high = rng.choices(((3, 30), (30, 80), (100, 250)), weights=(60, 25, 15))[0]
    prompt = f"{n}:" + "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high)))
    max_tokens = rng.choice((rng.randint(2, 40), rng.randint(40, 120)))
    kind = rng.random()
    if kind < 0.05:
        return Wish(n=n, prompt=prompt, max_tokens=max_tokens, cancel_after=rng.randint(0, max_tokens // 2))
    if kind < 0.10:
        return Wish(n=n, prompt=prompt, max_tokens=max_tokens, deadline_s=rng.uniform(0.1, 1.0))
    if kind < 0.15:
        return Wish(n=n, prompt=prompt, max_tokens=max_tokens, is_pinned=True)
    if kind < 0.18:
        return Wish(n=n, prompt=prompt, max_tokens=MAX_LEN, is_too_long=True)
    return Wish(n=n, prompt=prompt, max_tokens=max_tokens)


@lru_cache(maxsize=4096)
def expected(prompt: str, max_tokens: int) -> tuple[int, ...]:
    """The ids of an uncut run: each token depends on all before it."""
    ids = list(prompt.encode())
    start = len(ids)
    while len(ids) < start + max_tokens:
        ids.append(next_token(ids))
    return tuple(ids[start:])
