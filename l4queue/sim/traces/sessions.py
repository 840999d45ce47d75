"""Seeded workloads of many turns: conversations whose history grows, behind system prompts that many share.

Sessions begin as a Poisson process. The prompt of a turn is the system prompt, all that was said before, and a new
message. The next turn comes when the answer was made at a usual pace, and somebody has thought, or a tool has run.
Any turn may be the last: caches still hold what is abandoned. A faster trace has more sessions, not quicker ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from l4queue.cost.step import BLOCK_TOKENS
from l4queue.errors import ConfigError
from l4queue.sim.engine.request import Chain
from l4queue.sim.traces.content import Chains, joined
from l4queue.sim.traces.trace import Trace

__all__ = ("SESSIONS", "SessionModel", "SessionTrace", "make_sessions")

_S_PER_TOKEN = 0.03
"""Pace of an answer before somebody thinks of the next turn, s a token. Chosen: usual for 8B models on H100."""
_SETTLING = 20.0
"""Mean cycles of a turn before the trace begins, so that sessions of all ages are there. Chosen: under geometric
numbers of turns few sessions are older."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionModel:
    """Means of the distributions. System prompts are drawn by Zipf's law (1/rank); lengths are log-normal, σ = 1.

    `goes_on` is the chance of another turn after each. A session also ends before its context exceeds
    `max_context_tokens`.
    """

    num_systems: int
    system_tokens: int
    message_tokens: int
    output_tokens: int
    goes_on: float
    think_s: float
    max_context_tokens: int = 32_768

    @property
    def mean_turns(self) -> float:
        """Turns of a session, on average, where its context does not end it."""
        return 1.0 / (1.0 - self.goes_on)

    @property
    def cycle_s(self) -> float:
        """Time from turn to turn, on average."""
        return self.think_s + _S_PER_TOKEN * self.output_tokens


SESSIONS: Mapping[str, SessionModel] = {
    "multi-turn": SessionModel(
        num_systems=8, system_tokens=800, message_tokens=250, output_tokens=250, goes_on=0.8, think_s=30.0
    ),
    "agent": SessionModel(
        num_systems=20, system_tokens=5_000, message_tokens=700, output_tokens=180, goes_on=0.85, think_s=4.0
    ),
}
"""By name. `multi-turn`: people who chat, with outputs near those of LMSYS-Chat-1M (Zheng et al., 2023: 214).
`agent`: tools in a loop, with prompts and outputs near those of Mooncake's tool-and-agent trace (Qin et al., FAST
2025: 8,596 and 182 tokens on average). All else is chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTrace(Trace):
    """A trace of sessions, which knows how it was made: at another rate there are other sessions."""

    seed: int
    offered_rps: float

    def scaled(self, rate_scale: float) -> Trace:
        """As many requests of more sessions, or of fewer, at a rate so many times as high."""
        made = make_sessions(
            self.name, num_requests=len(self), seed=self.seed, rate_rps=self.offered_rps * rate_scale
        )
        return made if self.chains is not None else made.without_content()


def make_sessions(name: str, *, num_requests: int, seed: int, rate_rps: float = 1.0) -> SessionTrace:
    """The first `num_requests` requests after sessions of all ages are there. ConfigError for an unknown name."""
    if name not in SESSIONS:
        raise ConfigError(f"workload {name!r} is unknown; choose one of {', '.join(SESSIONS)}")
    if num_requests < 1 or rate_rps <= 0:
        raise ConfigError(f"workload {name!r}: needs at least one request and a positive rate")
    model, rng = SESSIONS[name], np.random.default_rng(seed)
    begin_s = _SETTLING * model.cycle_s
    chains = Chains(BLOCK_TOKENS)
    systems = [(tokens, chains.new_span(tokens // BLOCK_TOKENS)) for tokens in _systems(model, rng)]
    ranks = 1.0 / np.arange(1, len(systems) + 1)
    turns: list[tuple[float, int, int, int, Chain]] = []
    enough_s = float("inf")
    number, start_s = 0, 0.0
    while start_s < enough_s:
        start_s += float(rng.exponential(model.mean_turns / rate_rps))
        tokens, span = systems[int(rng.choice(len(systems), p=ranks / ranks.sum()))]
        for at_s, prompt, output, chain in _session(model, rng, chains, system_tokens=tokens, system=span):
            if start_s + at_s >= begin_s:
                turns.append((start_s + at_s, number, prompt, output, chain))
        number += 1
        if len(turns) >= num_requests and start_s >= begin_s:
            turns = sorted(turns, key=lambda turn: turn[:2])[:num_requests]
            enough_s = turns[-1][0]
    arrivals = np.array([turn[0] for turn in turns]) - begin_s
    return SessionTrace(
        name=name,
        arrival_s=arrivals,
        input_tokens=np.array([turn[2] for turn in turns], dtype=np.int64),
        output_tokens=np.array([turn[3] for turn in turns], dtype=np.int64),
        chains=tuple(turn[4] for turn in turns),
        sessions=np.array([turn[1] for turn in turns], dtype=np.int64),
        seed=seed,
        offered_rps=rate_rps,
    )


def _systems(model: SessionModel, rng: np.random.Generator) -> list[int]:
    """Lengths of the system prompts: half of the context at most."""
    drawn = [_drawn(model.system_tokens, rng) for _ in range(model.num_systems)]
    return [min(tokens, model.max_context_tokens // 2) for tokens in drawn]


def _session(
    model: SessionModel, rng: np.random.Generator, chains: Chains, *, system_tokens: int, system: range
) -> list[tuple[float, int, int, Chain]]:
    """Turns of one session: time since it began, prompt and output tokens, chain."""
    lengths: list[tuple[float, int, int]] = []
    at_s, context = 0.0, system_tokens
    while True:
        message, output = _drawn(model.message_tokens, rng), _drawn(model.output_tokens, rng)
        if lengths and context + message + output > model.max_context_tokens:
            break
        lengths.append((at_s, min(context + message, model.max_context_tokens - output), output))
        context = sum(lengths[-1][1:])
        at_s += _S_PER_TOKEN * output + float(rng.exponential(model.think_s))
        if rng.random() >= model.goes_on:
            break
    own = chains.new_span(context // BLOCK_TOKENS - len(system))
    return [
        (at_s, prompt, output, joined([system, own[: (prompt + output) // BLOCK_TOKENS - len(system)]]))
        for at_s, prompt, output in lengths
    ]


def _drawn(mean_tokens: int, rng: np.random.Generator) -> int:
    """A length, log-normal with σ = 1, at most eight times the mean."""
    return max(1, min(8 * mean_tokens, round(float(rng.lognormal(np.log(mean_tokens) - 0.5, 1.0)))))
