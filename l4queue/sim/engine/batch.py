"""State of one engine's batch: its decodes, its KV, and its growth in closed form.

While the batch is fixed, every decode step costs γ·n more than the one before: each of the n contexts grew by a
token. So k steps take k·a + γ·n·k(k-1)/2, with a the first step's time. The number of steps that end by a given
time is the root of that quadratic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from heapq import heappop
from itertools import chain

from l4queue.cost.step import BLOCK_TOKENS, StepCost
from l4queue.models import UNBOUNDED_TOKENS
from l4queue.sim.engine.prefix_cache import PrefixCache
from l4queue.sim.engine.request import Chain, SimRequest

__all__ = ("BLOCK_TOKENS", "Batch")


class Batch:
    """Content of an engine. Policies may read counts and sums, no output lengths."""

    __slots__ = (
        "_alarms",
        "_decodes",
        "_finishes",
        "_growth_ms",
        "_longest",
        "_once_ms",
        "_phases",
        "_prefills",
        "_segment_prefills",
        "_segment_steps",
        "_sequence",
        "_step_ms",
        "_waiting",
        "alarmed",
        "block_tokens",
        "blocks_total",
        "blocks_used",
        "busy_s",
        "context_tokens",
        "copy_ms",
        "cost",
        "end_s",
        "finished",
        "index",
        "is_at_boundary",
        "now_s",
        "num_decodes",
        "num_preempted",
        "num_steps",
        "pending_tokens",
        "prefix_cache",
        "removals",
        "removed",
        "stage",
        "started",
        "step",
        "version",
    )

    def __init__(
        self,
        index: int,
        *,
        cost: StepCost,
        prefix_cache: PrefixCache | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.index = index
        self.block_tokens = block_tokens
        self.cost = cost
        self.prefix_cache = prefix_cache
        self.stage = 0
        self.now_s = 0.0
        self.end_s: float | None = None
        self.version = 0
        self.step = 0
        self.num_steps = 0
        self.busy_s = 0.0
        self.num_preempted = 0
        self.blocks_total = max(1, (cost.kv_capacity_tokens or UNBOUNDED_TOKENS) // self.block_tokens)
        self.blocks_used = 0
        self.num_decodes = 0
        self.context_tokens = 0
        #: lengths of the requests that are prefilled here and have no token yet, admitted or waiting: a worker
        #: learns how far its engine is in a prompt when the prompt is through
        self.pending_tokens = 0
        #: True where the next `start_segment` is already due at this instant
        self.is_at_boundary = False
        self._sequence = 0
        self._decodes: dict[SimRequest, None] = {}  # admission order, decoding and prefilling alike
        self._prefills: list[SimRequest] = []
        self._waiting: deque[SimRequest] = deque()
        self._finishes: list[tuple[int, int, SimRequest]] = []
        self._alarms: list[tuple[int, int, SimRequest]] = []
        self._longest: list[tuple[int, int, SimRequest]] = []
        self._phases = [0] * self.block_tokens
        self._segment_steps = 0
        self._segment_prefills: list[tuple[SimRequest, int]] = []
        self._step_ms = 0.0
        self._growth_ms = 0.0
        #: time that copies of KV caches take from the next segment, and from the running one
        self.copy_ms = self._once_ms = 0.0
        self.removals: dict[SimRequest, object] = {}
        #: what the last segment brought, for the cluster to read after `finish_segment`
        self.started: list[SimRequest] = []
        self.finished: list[SimRequest] = []
        self.alarmed: list[SimRequest] = []
        self.removed: list[tuple[SimRequest, object]] = []

    # ---------------------------------------------------------------- what policies may read

    @property
    def num_running(self) -> int:
        """Requests in the batch, decoding or in prefill."""
        return len(self._decodes)

    @property
    def num_waiting(self) -> int:
        """Requests handed to the engine that it has not admitted."""
        return len(self._waiting)

    @property
    def num_requests(self) -> int:
        """All requests in the engine."""
        return len(self._decodes) + len(self._waiting)

    @property
    def held_tokens(self) -> int:
        """Lengths of all requests in the engine, but for those whose KV cache has just arrived."""
        return self.context_tokens + self.pending_tokens

    @property
    def longest_prefill_tokens(self) -> int:
        """Length of the longest request without a token that is prefilled here; 0 for none."""
        if not self.pending_tokens:
            return 0
        return max(r.length for r in self.untouched())

    def untouched(self) -> Iterator[SimRequest]:
        """Requests that are prefilled here and have no token yet, admitted or waiting."""
        return (r for r in chain(self._prefills, self._waiting) if not r.has_kv)

    @property
    def kv_used_tokens(self) -> int:
        """KV tokens taken, in whole blocks."""
        return self.blocks_used * self.block_tokens

    @property
    def kv_free_tokens(self) -> int:
        """KV tokens free once what waits in the engine is in."""
        return self.blocks_total * self.block_tokens - self.kv_used_tokens - sum(r.length for r in self._waiting)

    def cached_blocks(self, chain: Chain, most: int) -> int:
        """How many of the first `most` blocks of a chain the prefix cache has now, up to one that it has not."""
        return 0 if self.prefix_cache is None else self.prefix_cache.num_known(chain, most)

    @property
    def step_ms(self) -> float:
        """Time of a decode step with the present batch, ms."""
        return self._decode_step_ms()

    def requests(self) -> Iterator[SimRequest]:
        """All requests in the engine, in no particular order."""
        return chain(self._decodes, self._waiting)

    def running(self) -> Iterator[SimRequest]:
        """Requests in the batch in admission order."""
        return iter(self._decodes)

    def decoding_lengths(self) -> Iterator[tuple[SimRequest, int]]:
        """Requests past their prefill with their length at the last boundary, tokens."""
        step = self.step
        return ((r, r.join_base + step) for r in self._decodes if r.left_tokens == 0)

    def waiting(self) -> Iterator[SimRequest]:
        """Requests in the engine's own queue, next first."""
        return iter(self._waiting)

    # ---------------------------------------------------------------- growth

    def _decode_step_ms(self) -> float:
        n = self.num_decodes
        if not n:
            return 0.0
        cost = self.cost
        step_ms = cost.alpha_ms + cost.beta_ms * n + cost.gamma_ms * self.context_tokens
        if cost.sigma_ms:
            step_ms += cost.sigma_ms * self._skew_tokens()
        return step_ms

    def _skew_tokens(self) -> int:
        """n·(longest - mean): unchanged by growth, so valid for a whole segment."""
        heap = self._longest
        while heap:
            base, _, request = heap[0]
            if request in self._decodes and request.left_tokens == 0 and request.join_base == -base:
                return self.num_decodes * (self.step - base) - self.context_tokens
            heappop(heap)
        return 0

    def _run_ms(self, steps: int) -> float:
        return self._once_ms + steps * self._step_ms + self._growth_ms * (steps * (steps - 1) // 2)

    def _steps_until(self, now_s: float) -> int:
        """Fewest steps (≥ 1) of the running decode segment that end at or after `now_s`."""
        elapsed_ms = (now_s - self.now_s) * 1000.0
        pure_ms = elapsed_ms - self._once_ms
        if pure_ms <= self._step_ms:
            return 1
        half = self._growth_ms / 2.0
        linear = self._step_ms - half
        if half > 0.0:
            root = (math.sqrt(linear * linear + 4.0 * half * pure_ms) - linear) / (2.0 * half)
        else:
            root = pure_ms / linear
        steps = max(1, math.ceil(root - 1e-9))
        # rounding of the root may be off by one step either way
        while steps > 1 and self._run_ms(steps - 1) >= elapsed_ms:
            steps -= 1
        while self._run_ms(steps) < elapsed_ms - 1e-9:
            steps += 1
        return steps

    def _decode_run_steps(self) -> int:
        """Decode steps until a finish, an alarm or a KV overflow, whichever is first."""
        finishes = self._finishes
        while finishes:
            finish_step, _, request = finishes[0]
            if request.finish_step == finish_step and request in self._decodes and not request.left_tokens:
                break
            heappop(finishes)
        steps = finishes[0][0] - self.step
        alarms = self._alarms
        while alarms and (alarms[0][2] not in self._decodes):
            heappop(alarms)
        if alarms:
            steps = min(steps, max(1, alarms[0][0] - self.step))
        if self.removals:
            return 1
        free = self.blocks_total - self.blocks_used
        # a lone request that outgrew the cache has nobody to preempt: it runs on
        if 0 <= free < self.num_decodes * (steps // self.block_tokens + 1):
            steps = min(steps, self._steps_before_overflow(free))
        return steps

    def _steps_before_overflow(self, free: int) -> int:
        """Steps that can run before the blocks run out: step j needs the growth of steps before it."""
        cycles = free // self.num_decodes
        free -= cycles * self.num_decodes
        steps = cycles * self.block_tokens
        for offset in range(self.block_tokens):
            free -= self._phases[-(self.step + offset) % self.block_tokens]
            steps += 1
            if free < 0:
                return steps
        return steps

    def _grow(self, steps: int) -> None:
        """All decoding contexts grow by `steps` tokens, taking blocks as they cross block edges.

        Blocks for the next step are taken when it begins: after those of finished requests are free again.
        """
        n = self.num_decodes
        if n:
            cycles, rest = divmod(steps, self.block_tokens)
            used = self.blocks_used + cycles * n
            phases = self._phases
            for offset in range(rest):
                used += phases[-(self.step + offset) % self.block_tokens]
            self.blocks_used = used
            self.context_tokens += n * steps
            if self.prefix_cache is not None:
                self.prefix_cache.trim(
                    self.blocks_total - used + phases[-(self.step + steps - 1) % self.block_tokens]
                )
        self.step += steps
