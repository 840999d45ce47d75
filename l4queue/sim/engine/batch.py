"""State of one engine's batch: its decodes, its KV, and its growth in closed form.

While the batch is fixed, every decode step costs γ·n more than the one before: each of the n contexts grew by a
token. So k steps take k·a + γ·n·k(k-1)/2, with a the first step's time. The number of steps that end by a given
time is the root of that quadratic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import chain

from l4queue.cost.step import BLOCK_TOKENS, StepCost
from l4queue.models import UNBOUNDED_TOKENS
from l4queue.sim.engine.request import SimRequest

__all__ = ("BLOCK_TOKENS", "Batch")


class Batch:
    """Content of an engine. Policies may read counts and sums, no output lengths."""

    __slots__ = (
        "_alarms",
        "_decodes",
        "_finishes",
        "_growth_ms",
        "_longest",
        "_phases",
        "_prefills",
        "_segment_prefills",
        "_segment_steps",
        "_sequence",
        "_step_ms",
        "_waiting",
        "alarmed",
        "blocks_total",
        "blocks_used",
        "busy_s",
        "context_tokens",
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
        "removals",
        "removed",
        "stage",
        "started",
        "step",
        "version",
    )

    def __init__(self, index: int, *, cost: StepCost) -> None:
        self.index = index
        self.cost = cost
        self.stage = 0
        self.now_s = 0.0
        self.end_s: float | None = None
        self.version = 0
        self.step = 0
        self.num_steps = 0
        self.busy_s = 0.0
        self.num_preempted = 0
        self.blocks_total = max(1, (cost.kv_capacity_tokens or UNBOUNDED_TOKENS) // BLOCK_TOKENS)
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
        self._phases = [0] * BLOCK_TOKENS
        self._segment_steps = 0
        self._segment_prefills: list[tuple[SimRequest, int]] = []
        self._step_ms = 0.0
        self._growth_ms = 0.0
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
        return max(r.length for r in chain(self._prefills, self._waiting) if not r.has_kv)

    @property
    def kv_used_tokens(self) -> int:
        """KV tokens taken, in whole blocks."""
        return self.blocks_used * BLOCK_TOKENS

    @property
    def kv_free_tokens(self) -> int:
        """KV tokens free once what waits in the engine is in."""
        return self.blocks_total * BLOCK_TOKENS - self.kv_used_tokens - sum(r.length for r in self._waiting)

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
        return steps * self._step_ms + self._growth_ms * (steps * (steps - 1) // 2)

    def _steps_until(self, now_s: float) -> int:
        """Fewest steps (≥ 1) of the running decode segment that end at or after `now_s`."""
        elapsed_ms = (now_s - self.now_s) * 1000.0
        if elapsed_ms <= self._step_ms:
            return 1
        half = self._growth_ms / 2.0
        linear = self._step_ms - half
        if half > 0.0:
            root = (math.sqrt(linear * linear + 4.0 * half * elapsed_ms) - linear) / (2.0 * half)
        else:
            root = elapsed_ms / linear
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
        if 0 <= free < self.num_decodes * (steps // BLOCK_TOKENS + 1):
            steps = min(steps, self._steps_before_overflow(free))
        return steps

    def _steps_before_overflow(self, free: int) -> int:
        """Steps that can run before the blocks run out: step j needs the growth of steps before it."""
        cycles = free // self.num_decodes
        free -= cycles * self.num_decodes
        steps = cycles * BLOCK_TOKENS
        for offset in range(BLOCK_TOKENS):
            free -= self._phases[-(self.step + offset) % BLOCK_TOKENS]
            steps += 1
            if free < 0:
                return steps
        return steps

    def _grow(self, steps: int) -> None:
        """All decoding contexts grow by `steps` tokens, taking blocks as they cross block edges."""
        n = self.num_decodes
        if n:
            cycles, rest = divmod(steps, BLOCK_TOKENS)
            used = self.blocks_used + cycles * n
            phases = self._phases
            for offset in range(rest):
                used += phases[-(self.step + offset) % BLOCK_TOKENS]
            self.blocks_used = used
            self.context_tokens += n * steps
        self.step += steps

    def _make_room(self) -> bool:
        """Preempt from the back until every decode has its block; True when something was preempted."""
        has_preempted = False
        while self.blocks_used > self.blocks_total and len(self._decodes) > 1:
            request = next(reversed(self._decodes))
            if request.left_tokens:
                self._prefills.remove(request)
                del self._decodes[request]
                self.blocks_used -= _blocks(request.length)
                request.left_tokens = 0
            else:
                self._drop_decode(request)
                self.pending_tokens += request.length
            self.removals.pop(request, None)
            request.has_kv = False
            request.num_preemptions += 1
            self.num_preempted += 1
            self._waiting.appendleft(request)
            has_preempted = True
        return has_preempted

    def _schedule_prefills(self, has_preempted: bool) -> tuple[int, float]:
        """Fill this step's token budget with chunks; returns tokens and query-key pairs of the prefill."""
        budget = self.cost.max_batched_tokens - self.num_decodes
        longest = self.cost.max_chunk_tokens if self.num_requests > 1 else budget
        pairs = 0.0
        tokens = 0
        chunks = self._segment_prefills
        for request in self._prefills:
            if budget <= 0:
                break
            chunk = min(request.left_tokens, budget, longest)
            pairs += chunk * (request.length - request.left_tokens + chunk / 2.0)
            tokens += chunk
            budget -= chunk
            chunks.append((request, chunk))
        waiting = self._waiting
        while waiting and budget > 0 and not has_preempted and len(self._decodes) < self.cost.max_num_seqs:
            request = waiting[0]
            # a context with its cache needs room for the token it decodes next
            length = request.length
            blocks = _blocks(length)
            if self.blocks_used + blocks > self.blocks_total and self._decodes:
                break
            waiting.popleft()
            self._decodes[request] = None
            if request.has_kv:
                self._join(request)
                budget -= 1
                continue
            self.blocks_used += blocks
            chunk = min(length, budget, longest)
            request.left_tokens = length
            self._prefills.append(request)
            pairs += chunk * chunk / 2.0
            tokens += chunk
            budget -= chunk
            chunks.append((request, chunk))
        return tokens, pairs

    def _apply_prefills(self, end_s: float) -> None:
        is_done = False
        for request, chunk in self._segment_prefills:
            request.left_tokens -= chunk
            if request.left_tokens:
                continue
            is_done = True
            self.pending_tokens -= request.length
            self.blocks_used -= _blocks(request.length)
            request.generated += 1
            if request.first_token_s is None:
                request.first_token_s = end_s
                self.started.append(request)
            if request.generated >= request.output_tokens:
                del self._decodes[request]
                request.finish_s = end_s
                self.finished.append(request)
            else:
                self._join(request)
        if is_done:
            self._prefills = [r for r in self._prefills if r.left_tokens]
        self._segment_prefills = []

    def _join(self, request: SimRequest) -> None:
        """Let a request decode from the present boundary on."""
        length = request.length
        self.num_decodes += 1
        self.context_tokens += length
        self.blocks_used += _blocks(length)
        base = request.join_base = length - self.step
        request.has_kv = True
        request.finish_step = self.step + request.output_tokens - request.generated
        self._phases[base % BLOCK_TOKENS] += 1
        self._sequence += 1
        heappush(self._finishes, (request.finish_step, self._sequence, request))
        if request.watch_tokens is not None:
            self._set_alarm(request)
        if self.cost.sigma_ms:
            heappush(self._longest, (-base, self._sequence, request))

    def _set_alarm(self, request: SimRequest) -> None:
        assert request.watch_tokens is not None
        at_step = request.watch_tokens - request.join_base
        if at_step < request.finish_step:
            self._sequence += 1
            heappush(self._alarms, (max(at_step, self.step + 1), self._sequence, request))

    def _drop_decode(self, request: SimRequest) -> None:
        """Take a decoding request out of the batch; its `generated` becomes exact."""
        length = request.join_base + self.step
        del self._decodes[request]
        self.num_decodes -= 1
        self.context_tokens -= length
        self.blocks_used -= _blocks(length)
        self._phases[request.join_base % BLOCK_TOKENS] -= 1
        request.generated = length - request.prompt_tokens

    def _raise_alarms(self) -> None:
        alarms = self._alarms
        while alarms and alarms[0][0] <= self.step:
            request = heappop(alarms)[2]
            if request.watch_tokens is None or request not in self._decodes or request.left_tokens:
                continue
            if request.join_base + self.step >= request.watch_tokens:
                request.watch_tokens = None
                self.alarmed.append(request)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
