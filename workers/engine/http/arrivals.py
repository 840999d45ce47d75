"""Steps of an engine that only its tokens tell of: their times, and the work that they had.

Every request that generates gets its token of a step at the same time. So a step ends where tokens begin to
arrive after a pause, or where a request gets its next one. Prefill shows by its first token only. It is spread
over the steps before as vLLM does it: as many tokens as a step may have, in order of arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from workers.engine.base import MAX_STEP_RECORDS, StepRecord

__all__ = ("ArrivalWatch",)

_PAUSE = 0.25
"""Pause between two tokens that parts steps, in units of the last step. Chosen: tokens of a step come within a few
milliseconds, and a step with a prefill is longer than the last one."""


@dataclass(slots=True, kw_only=True)
class _Prompt:
    """A request without its first token."""

    num_tokens: int
    done_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class _Burst:
    """Tokens that arrived together: the end of a step."""

    began_s: float
    last_s: float
    decoded: dict[str, int]  # length before this token, of those that had begun
    prefilled: dict[str, _Prompt]
    num_tokens: int = 0  # new ones of the decoded requests
    most_tokens: int = 1  # of one request at once


class ArrivalWatch:
    """Follows the requests that this worker sends. `clock` gives seconds.

    Tokens that came together for one request are of as many steps, unless the engine speculates: an event loop
    that is late hands them over in one piece.
    """

    def __init__(self, *, max_batched_tokens: int, clock: Callable[[], float]) -> None:
        self._max_batched_tokens = max_batched_tokens
        self._clock = clock
        self._prompts: dict[str, _Prompt] = {}
        self._lengths: dict[str, int] = {}  # tokens, of requests that generate
        self._burst: _Burst | None = None
        self._since_s = clock()  # when the step began whose end comes next
        self._records: deque[StepRecord] = deque(maxlen=MAX_STEP_RECORDS)
        self.is_speculating = False
        self.num_steps = 0
        self.last_step_ms = 0.0

    @property
    def held_tokens(self) -> int:
        """Tokens of all requests that are in the engine, as far as they are known to be computed or waited for."""
        return sum(self._lengths.values()) + sum(prompt.num_tokens for prompt in self._prompts.values())

    def sent(self, request_id: str, *, num_tokens: int) -> None:
        """A request goes to the engine."""
        if not self._prompts and not self._lengths:
            self._end_burst()
            self._since_s = self._clock()
        self._prompts[request_id] = _Prompt(num_tokens=num_tokens)

    def came(self, request_id: str, *, num_tokens: int) -> None:
        """New tokens of a request have arrived."""
        if request_id not in self._prompts and request_id not in self._lengths:
            return
        now_s = self._clock()
        burst = self._burst
        if burst is None or self._is_next(burst, request_id, now_s):
            self._end_burst()
            burst = self._burst = _Burst(began_s=now_s, last_s=now_s, decoded={}, prefilled={})
        burst.last_s = now_s
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            burst.prefilled[request_id] = prompt
            self._lengths[request_id] = prompt.num_tokens + num_tokens
        else:
            burst.decoded[request_id] = self._lengths[request_id]
            burst.num_tokens += num_tokens
            burst.most_tokens = max(burst.most_tokens, num_tokens)
            self._lengths[request_id] += num_tokens

    def left(self, request_id: str) -> None:
        """A request is through, or aborted."""
        self._prompts.pop(request_id, None)
        self._lengths.pop(request_id, None)

    def take_records(self) -> list[StepRecord]:
        """Steps since the last call, oldest first."""
        records = list(self._records)
        self._records.clear()
        return records

    def _is_next(self, burst: _Burst, request_id: str, now_s: float) -> bool:
        if request_id in burst.decoded or request_id in burst.prefilled:
            return True
        return self.last_step_ms > 0 and (now_s - burst.last_s) * 1000 > _PAUSE * self.last_step_ms

    def _end_burst(self) -> None:
        """Record the steps that ended with the last tokens."""
        burst, self._burst = self._burst, None
        if burst is None:
            return
        elapsed_ms, self._since_s = max(0.0, burst.began_s - self._since_s) * 1000, burst.began_s
        lengths = list(burst.decoded.values())
        chunks = self._chunks(burst, num_decodes=len(lengths))
        num_tokens, tokens_per_decode = burst.most_tokens, 1.0
        if self.is_speculating:
            num_tokens, tokens_per_decode = 1, burst.num_tokens / len(lengths) if lengths else 1.0
        num_steps = max(num_tokens, len(chunks))
        chunks += [(0, 0.0)] * (num_steps - len(chunks))
        total, longest = sum(lengths), max(lengths, default=0)
        self.num_steps += num_steps
        self.last_step_ms = elapsed_ms / num_steps
        for prefill_tokens, prefill_pairs in chunks:
            self._records.append(
                StepRecord(
                    elapsed_ms=self.last_step_ms,
                    num_decodes=len(lengths),
                    context_tokens=total,
                    prefill_tokens=prefill_tokens,
                    prefill_pairs=prefill_pairs,
                    skew_tokens=longest * len(lengths) - total,
                    tokens_per_decode=tokens_per_decode,
                )
            )

    def _chunks(self, burst: _Burst, *, num_decodes: int) -> list[tuple[int, float]]:
        """Prefill tokens and query-key pairs of the steps that a burst ends.

        Beside requests that generate it is one step, in which prompts go on that have no token yet. Without any,
        all steps that the finished prompts took are seen only now.
        """
        budget = self._max_batched_tokens - num_decodes
        finished = list(burst.prefilled.values())
        if num_decodes:
            tokens, pairs = 0, 0.0
            for prompt in finished + list(self._prompts.values()):
                chunk = min(budget - tokens, prompt.num_tokens - prompt.done_tokens)
                if chunk > 0:
                    tokens, pairs = tokens + chunk, pairs + _advance(prompt, chunk)
            return [(tokens, pairs)]
        chunks: list[tuple[int, float]] = []
        for prompt in finished:
            while (left := prompt.num_tokens - prompt.done_tokens) > 0:
                before = chunks.pop() if chunks and chunks[-1][0] < budget else (0, 0.0)
                chunk = min(budget - before[0], left)
                chunks.append((before[0] + chunk, before[1] + _advance(prompt, chunk)))
        return chunks


def _advance(prompt: _Prompt, chunk: int) -> float:
    """Compute so much more of a prompt; its query-key pairs."""
    pairs = chunk * (prompt.done_tokens + chunk / 2)
    prompt.done_tokens += chunk
    return pairs
