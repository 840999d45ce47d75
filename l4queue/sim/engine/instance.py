"""One engine with continuous batching as in vLLM V1, advanced in closed form between events.

A *segment* is what the engine does until something changes: either one step with prefill chunks in it, or a
run of pure decode steps, whose closed form is in `batch.py`. A segment ends at a finish, at an alarm (a watched
request reached a length), before the KV cache overflows, or at an interrupt.

Rules taken from vLLM's scheduler:

- Decodes first, then partial prefills, then waiting requests in FCFS order, while token budget, `max_num_seqs` and
  KV blocks allow. A request that has run before goes before new ones.
- With others there, no prompt takes all of a step (`StepCost.max_chunk_tokens`).
- A prompt is admitted only if all of it fits.
- When a decode finds no block, the request admitted last is preempted, loses its cache and waits at the front.
"""

from __future__ import annotations

from heapq import heappop

from l4queue.sim.engine.batch import BLOCK_TOKENS
from l4queue.sim.engine.prefill import ChunkedPrefill
from l4queue.sim.engine.request import SimRequest

__all__ = ("BLOCK_TOKENS", "Instance")


class Instance(ChunkedPrefill):
    """One engine. The cluster starts segments, tells it of arrivals, and collects what a segment brought.

    `now_s` is the last step boundary: state is exact there. `end_s` is the end of the running segment, None
    when idle. Everything the policies may read is plain: counts, sums, no output lengths.
    """

    __slots__ = ()

    # ---------------------------------------------------------------- orders from the cluster

    def push(self, request: SimRequest) -> None:
        """Hand a request to the engine's own queue; it enters at the next boundary that has room.

        One that has run before goes before new ones.
        """
        if not request.has_kv:
            self.pending_tokens += request.length
        if request.generated:
            place = next((i for i, other in enumerate(self._waiting) if not other.generated), len(self._waiting))
            self._waiting.insert(place, request)
        else:
            self._waiting.append(request)

    def watch(self, request: SimRequest, *, length_tokens: int) -> None:
        """Raise an alarm at the boundary where a request has grown to `length_tokens`, or at the next one.

        The wish stays with the request: where it is not decoding now, it counts from when it is.
        """
        request.watch_tokens = length_tokens
        if request in self._decodes and not request.left_tokens:
            self._set_alarm(request)

    def length_of(self, request: SimRequest) -> int:
        """Length of a request in the batch at the last boundary, tokens."""
        return request.join_base + self.step if request.left_tokens == 0 else request.length

    def ask_back(self, request: SimRequest, tag: object) -> None:
        """Release a decoding request at the next boundary; it then appears in `removed` with its tag."""
        self.removals[request] = tag

    def copy_kv(self, lost_ms: float) -> None:
        """Lose time to a copy of a KV cache, in the next segment; an idle engine loses none."""
        if self.num_running:
            self.copy_ms += lost_ms

    def interrupt(self, now_s: float) -> bool:
        """End a decode run at the first boundary at or after `now_s`; True when `end_s` changed."""
        if self.end_s is None or self._segment_prefills or self._segment_steps == 1:
            return False
        steps = self._steps_until(now_s)
        if steps >= self._segment_steps:
            return False
        self._segment_steps = steps
        self.end_s = self.now_s + self._run_ms(steps) / 1000.0
        self.version += 1
        return True

    # ---------------------------------------------------------------- segments

    def start_segment(self, now_s: float) -> bool:
        """Schedule the next segment from the boundary `now_s`; False when there is nothing to do."""
        self.now_s = now_s
        self.is_at_boundary = False
        self.version += 1
        has_preempted = self._make_room()
        self._segment_prefills = []
        pairs = 0.0
        tokens = 0
        if self._prefills or self._waiting:
            tokens, pairs = self._schedule_prefills(has_preempted)
        if not self.num_decodes and not tokens:
            self.end_s = None
            return False
        self._once_ms, self.copy_ms = self.copy_ms, 0.0
        step_ms = self._decode_step_ms()
        if tokens:
            cost = self.cost
            self._segment_steps = 1
            self._step_ms = step_ms + cost.pi_ms * tokens + cost.psi_ms * pairs
            if not self.num_decodes:
                self._step_ms += cost.alpha_ms
            self._growth_ms = 0.0
        else:
            # what lost its cache may fit with what is still known of it, but not in this step
            is_retried = has_preempted and self.prefix_cache is not None
            self._segment_steps = 1 if is_retried else self._decode_run_steps()
            self._step_ms = step_ms
            self._growth_ms = self.cost.gamma_ms * self.num_decodes
        self.end_s = now_s + self._run_ms(self._segment_steps) / 1000.0
        return True

    def finish_segment(self) -> None:
        """Apply the segment that ends now: tokens, growth, first tokens, finishes, alarms, removals."""
        assert self.end_s is not None
        end_s = self.end_s
        steps = self._segment_steps
        self.busy_s += end_s - self.now_s
        self.now_s = end_s
        self.end_s = None
        self.is_at_boundary = True
        self.num_steps += steps
        self.started, self.finished, self.alarmed, self.removed = [], [], [], []
        self._grow(steps)
        if self._segment_prefills:
            self._apply_prefills(end_s)
        finishes = self._finishes
        while finishes and finishes[0][0] <= self.step:
            finish_step, _, request = heappop(finishes)
            if request.finish_step == finish_step and request in self._decodes and not request.left_tokens:
                self._drop_decode(request)
                request.finish_s = end_s
                self.finished.append(request)
        self._raise_alarms()
        if self.removals:
            self.release_now()

    def release_now(self) -> None:
        """Move decoding requests that were asked back from the batch to `removed`. At a boundary only."""
        for request, tag in list(self.removals.items()):
            if request in self._decodes and not request.left_tokens:
                self._drop_decode(request)
                self.removed.append((request, tag))
            elif request in self._decodes:
                continue  # in prefill: at a later boundary
            del self.removals[request]
