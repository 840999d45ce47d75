"""Step records from vLLM's per-step statistics and the requests in its batch.

vLLM reports how many tokens a step computed, not for which requests. The watch knows the requests, so it follows
them through the scheduler's order: prefills as they began, then priority and arrival. From there it works out
contexts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from workers.engine.base import MAX_STEP_RECORDS, StepRecord

__all__ = ("StepWatch",)


@dataclass(slots=True, kw_only=True)
class _Prefill:
    """A request without its first token."""

    order: tuple[int, int]  # priority, arrival
    left_tokens: int
    done_tokens: int = 0
    begun: int = 0  # the how-manieth to get tokens; 0: none yet


class StepWatch:
    """Report of the last step, and records of the steps since they were last asked for.

    `clock` gives seconds. vLLM's own time of a step leaves out the model where that runs in the engine core's
    process; a step that ends no token of a running request is timed here, from the step before or from the arrival
    that ended a pause. `max_chunk_tokens` is the most of one prompt in a step that has others to think of.
    """

    def __init__(self, *, max_chunk_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_chunk_tokens = max_chunk_tokens
        self._num_begun = 0
        self._clock = clock
        self._since_s = clock()
        self.num_running = 0
        self.num_waiting = 0
        self.kv_share = 0.0
        self.num_steps = 0
        self.last_step_ms = 0.0
        self.num_preemptions = 0
        self._num_arrived = 0
        self._decoding: dict[str, int] = {}  # length up to the last token, tokens
        self._prefills: dict[str, _Prefill] = {}
        self._records: deque[StepRecord] = deque(maxlen=MAX_STEP_RECORDS)

    def arrived(self, request_id: str, *, num_tokens: int, priority: int) -> None:
        """A request goes to the engine."""
        if not self._prefills and not self._decoding:
            self._since_s = self._clock()
        self._num_arrived += 1
        self._prefills[request_id] = _Prefill(order=(priority, self._num_arrived), left_tokens=num_tokens)

    def grew(self, request_id: str, *, length_tokens: int) -> None:
        """A request has grown to this length: its prefill is over. The steps recorded may be ahead of it."""
        self._prefills.pop(request_id, None)
        self._decoding[request_id] = max(length_tokens, self._decoding.get(request_id, 0))

    def left(self, request_id: str) -> None:
        """A request is through, or aborted."""
        self._prefills.pop(request_id, None)
        self._decoding.pop(request_id, None)

    def take_records(self) -> list[StepRecord]:
        """Steps since the last call, oldest first."""
        records = list(self._records)
        self._records.clear()
        return records

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Take in vLLM's `SchedulerStats` and `IterationStats` of one step, before its tokens are seen."""
        if scheduler_stats is None:
            return
        self.num_running = scheduler_stats.num_running_reqs
        self.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self.kv_share = scheduler_stats.kv_cache_usage
        details = scheduler_stats.iteration_details
        if details is None or details.is_dummy:
            return
        self.num_steps += 1
        now_s = self._clock()
        self.last_step_ms = max(details.elapsed_ms, (now_s - self._since_s) * 1000)
        self._since_s = now_s
        cached_tokens = 0
        if iteration_stats is not None:
            self.num_preemptions += iteration_stats.num_preempted_reqs
            cached_tokens = iteration_stats.prompt_token_stats.cached_tokens
            if gaps_s := iteration_stats.inter_token_latencies_iter:
                # From token to token of one request on the core's clock: the model and what vLLM does around it.
                # The least of the gaps, because others may have been preempted in between.
                self.last_step_ms = min(gaps_s) * 1000
        drafts = scheduler_stats.spec_decoding_stats
        num_drafted, num_accepted = (drafts.num_draft_tokens, drafts.num_accepted_tokens) if drafts else (0, 0)
        lengths = list(self._decoding.values())
        num_decodes, total = details.num_generation_requests, sum(lengths)
        # what a preempted request computes again counts as generated there, as drafts do
        recomputed_tokens = max(0, details.num_generation_tokens - num_decodes - num_drafted)
        mean = total / len(lengths) if lengths else 0.0
        self._records.append(
            StepRecord(
                elapsed_ms=self.last_step_ms,
                num_decodes=num_decodes,
                context_tokens=total,
                prefill_tokens=details.num_ctx_tokens + recomputed_tokens,
                prefill_pairs=self._advance(details.num_ctx_tokens, cached_tokens) + recomputed_tokens**2 / 2,
                skew_tokens=num_decodes * (max(lengths, default=0) - mean),
                tokens_per_decode=1 + num_accepted / num_decodes if num_decodes else 1.0,
            )
        )
        self._grow(num_decodes)

    def _grow(self, num_decodes: int) -> None:
        """Count the tokens of the step just recorded: the next step may be recorded before they are seen."""
        if num_decodes >= len(self._decoding):
            for request_id in self._decoding:
                self._decoding[request_id] += 1
        ended = {request_id: prefill for request_id, prefill in self._prefills.items() if not prefill.left_tokens}
        for request_id, prefill in ended.items():
            del self._prefills[request_id]
            self._decoding[request_id] = prefill.done_tokens + 1

    def _advance(self, num_tokens: int, cached_tokens: int) -> float:
        """Give a step's prefill tokens to requests in the scheduler's order; the query-key pairs they cost.

        Tokens found in the prefix cache are known only with the first token of their request, so a long
        prompt that hit the cache is taken for one computed from its start until then.
        """
        pairs = 0.0
        longest = self._max_chunk_tokens if len(self._prefills) + len(self._decoding) > 1 else num_tokens
        for prefill in self._in_order() if num_tokens else ():
            if cached_tokens:
                found = min(cached_tokens, prefill.left_tokens - 1)
                cached_tokens -= found
                prefill.done_tokens += found
                prefill.left_tokens -= found
            chunk = min(num_tokens, prefill.left_tokens, longest)
            if not prefill.begun:
                self._num_begun += 1
                prefill.begun = self._num_begun
            pairs += chunk * (prefill.done_tokens + chunk / 2)
            prefill.done_tokens += chunk
            prefill.left_tokens -= chunk
            num_tokens -= chunk
            if not num_tokens:
                break
        return pairs + num_tokens**2 / 2

    def _in_order(self) -> Sequence[_Prefill]:
        unfinished = (prefill for prefill in self._prefills.values() if prefill.left_tokens)
        return sorted(unfinished, key=lambda prefill: (not prefill.begun, prefill.begun, prefill.order))
