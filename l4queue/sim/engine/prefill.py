"""Admission to a batch, prefill in chunks, and the way out of it, by vLLM's rules."""

from __future__ import annotations

from heapq import heappop, heappush

from l4queue.sim.engine.batch import Batch
from l4queue.sim.engine.request import SimRequest

__all__ = ("ChunkedPrefill",)


class ChunkedPrefill(Batch):
    """A batch that takes requests in and lets them go."""

    __slots__ = ()

    def _make_room(self) -> bool:
        """Preempt from the back until every decode has its block; True when something was preempted."""
        has_preempted = False
        while self.blocks_used > self.blocks_total and len(self._decodes) > 1:
            request = next(reversed(self._decodes))
            if request.left_tokens:
                self._prefills.remove(request)
                del self._decodes[request]
                self._free_blocks(request, request.length, computed_tokens=request.length - request.left_tokens)
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
        self._evict()
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
            self._add_to_cache(request, chunk)
        waiting = self._waiting
        while waiting and budget > 0 and not has_preempted and len(self._decodes) < self.cost.max_num_seqs:
            request = waiting[0]
            found = self._find_cached(request)
            blocks = self._blocks(request.length) - self._shared_blocks(request, found)
            if self.blocks_used + blocks > self.blocks_total and self._decodes:
                break
            waiting.popleft()
            self._decodes[request] = None
            self._take_cached(request, found)
            if request.has_kv:
                self._join(request)
                self._evict()
                budget -= 1
                continue
            self.blocks_used += self._blocks(request.length)
            self._evict()
            cached = found * self.block_tokens
            left = request.length - cached
            chunk = min(left, budget, longest)
            request.left_tokens = left
            self._prefills.append(request)
            pairs += chunk * (cached + chunk / 2.0)
            tokens += chunk
            budget -= chunk
            chunks.append((request, chunk))
            self._add_to_cache(request, chunk)
        return tokens, pairs

    def _apply_prefills(self, end_s: float) -> None:
        is_done = False
        for request, chunk in self._segment_prefills:
            request.left_tokens -= chunk
            if request.left_tokens:
                continue
            is_done = True
            self.pending_tokens -= request.length
            self.blocks_used -= self._blocks(request.length)
            request.generated += 1
            if request.first_token_s is None:
                request.first_token_s = end_s
                self.started.append(request)
            if request.generated >= request.output_tokens:
                del self._decodes[request]
                self._free_cached(request, computed_tokens=request.length - 1)
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
        self.blocks_used += self._blocks(length)
        base = request.join_base = length - self.step
        request.has_kv = True
        request.finish_step = self.step + request.output_tokens - request.generated
        self._phases[base % self.block_tokens] += 1
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
        self._free_blocks(request, length, computed_tokens=length - 1)
        self._phases[request.join_base % self.block_tokens] -= 1
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

    # ---------------------------------------------------------------- blocks and the prefix cache

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _find_cached(self, request: SimRequest) -> int:
        return 0 if self.prefix_cache is None else self.prefix_cache.find(request)

    def _shared_blocks(self, request: SimRequest, found: int) -> int:
        return self.prefix_cache.num_held(request, found) if self.prefix_cache is not None and found else 0

    def _take_cached(self, request: SimRequest, found: int) -> None:
        """Let an admitted request hold what was found; of what it shares no second block is used."""
        cache = self.prefix_cache
        if request.cached_tokens is None:
            request.cached_tokens = found * self.block_tokens
        if cache is None:
            return
        self.blocks_used -= self._shared_blocks(request, found)
        cache.take(request, found)
        if request.has_kv:
            cache.add(request, request.length - 1)

    def _evict(self) -> None:
        """Let the prefix cache keep no more than the blocks that are not used."""
        if self.prefix_cache is not None:
            self.prefix_cache.trim(self.blocks_total - self.blocks_used)

    def _add_to_cache(self, request: SimRequest, chunk: int) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.add(request, request.length - request.left_tokens + chunk)

    def _free_blocks(self, request: SimRequest, length: int, *, computed_tokens: int) -> None:
        self.blocks_used -= self._blocks(length)
        self._free_cached(request, computed_tokens=computed_tokens)

    def _free_cached(self, request: SimRequest, *, computed_tokens: int) -> None:
        if self.prefix_cache is not None:
            self.blocks_used += self.prefix_cache.release(request, computed_tokens)
