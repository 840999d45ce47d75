"""Routers that people run, which send requests where their prefix is cached. Taken from sources: docs/routers.md.

Each decision is a function of plain values; the policies keep the state that the routers keep. A request is bound
to an engine on arrival. Routers see prompts, not outputs. Where they poll engines, they see them as they are now.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from l4queue.cost.step import BLOCK_TOKENS
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.prefix_cache import num_leading, part_of
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policy import Fleet, Policy

__all__ = ("CacheAware", "DynamoKv", "LlmD", "SessionSticky", "cache_aware_choice", "dynamo_cost", "llm_d_scores")

_CACHE_THRESHOLD, _BALANCE_ABS, _BALANCE_REL = 0.3, 64, 1.5
"""Share of the prompt, requests, ratio: defaults of the commands of SMG and of vLLM's router (docs/routers.md)."""
_QUEUE_WEIGHT, _USAGE_WEIGHT, _PREFIX_WEIGHT = 2.0, 2.0, 3.0
"""Weights of the scorers in llm-d's built-in configuration (docs/routers.md)."""
_MAX_MATCHED_BLOCKS = 256
"""Blocks of a prompt that llm-d's scorer looks at: its default (docs/routers.md)."""


def cache_aware_choice(loads: Sequence[tuple[int, int]], *, match_rate: float, holder: int) -> int:
    """Engine that a cache-aware router chooses. `loads`: requests there now, and routed there ever.

    The holder of the longest matching prefix, if more than the threshold of the prompt matches. The least loaded
    engine otherwise, and whenever loads are unbalanced.
    """
    counts = [now for now, _ in loads]
    is_unbalanced = max(counts) - min(counts) > _BALANCE_ABS and max(counts) > _BALANCE_REL * min(counts)
    if match_rate > _CACHE_THRESHOLD and not is_unbalanced:
        return holder
    return min(range(len(loads)), key=lambda i: (*loads[i], i))


class CacheAware(Policy):
    """Longest prefix in a tree of routed prompts, shortest queue where none is long or loads are unbalanced.

    As SGLang's router, and SMG and vLLM's router after it. A part of the tree belongs to the engine that it was
    first sent to. Their limit, 2²⁶ characters an engine, is not modelled: engines have forgotten that long before.
    """

    name = "cache-aware"

    def attach(self, cluster: Fleet) -> None:
        super().attach(cluster)
        self._owner: dict[int, int] = {}
        self._routed = [0] * len(cluster.instances)

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        instances = self.cluster.instances
        num_blocks = request.prompt_tokens // BLOCK_TOKENS
        matched = num_leading(request.chain, num_blocks, self._owner)
        last = next(part_of(request.chain, matched - 1, matched), None) if matched else None
        chosen = cache_aware_choice(
            [(instance.num_requests, self._routed[i]) for i, instance in enumerate(instances)],
            match_rate=matched * BLOCK_TOKENS / request.prompt_tokens,
            holder=self._owner[last.start] if last is not None else 0,
        )
        for span in part_of(request.chain, matched, num_blocks):
            self._owner.update(dict.fromkeys(span, chosen))
        self._routed[chosen] += 1
        self.cluster.push(request, instances[chosen])


def llm_d_scores(waiting: Sequence[int], usage: Sequence[float], matched: Sequence[float]) -> list[float]:
    """Score of each engine: its queue against the others', its free cache, the matched share of the prompt."""
    shortest, longest = min(waiting), max(waiting)
    queue = [1.0 if longest == shortest else (longest - w) / (longest - shortest) for w in waiting]
    return [
        _QUEUE_WEIGHT * q + _USAGE_WEIGHT * (1.0 - u) + _PREFIX_WEIGHT * m
        for q, u, m in zip(queue, usage, matched, strict=True)
    ]


class LlmD(Policy):
    """Highest sum of weighted scores: llm-d's endpoint picker with its built-in configuration; ties at random.

    Who holds what is a guess from routed prompts: for each engine as many of the latest blocks as its cache has.
    """

    name = "llm-d"

    def attach(self, cluster: Fleet) -> None:
        super().attach(cluster)
        self._holders: dict[int, set[int]] = {}
        self._latest: list[OrderedDict[int, None]] = [OrderedDict() for _ in cluster.instances]

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        instances = self.cluster.instances
        blocks = self._blocks(request)
        total = min(_MAX_MATCHED_BLOCKS, -(-request.prompt_tokens // BLOCK_TOKENS))
        matched = self._matched(blocks)
        scores = llm_d_scores(
            [i.num_waiting for i in instances],
            [i.blocks_used / i.blocks_total for i in instances],
            [count / total for count in matched],
        )
        best = max(scores)
        equal = [i for i, score in enumerate(scores) if score == best]
        chosen = equal[int(self.cluster.rng.integers(len(equal)))]
        self._add(blocks, instances[chosen])
        self.cluster.push(request, instances[chosen])

    def _blocks(self, request: SimRequest) -> list[int]:
        whole = min(_MAX_MATCHED_BLOCKS, request.prompt_tokens // BLOCK_TOKENS)
        return [block for span in part_of(request.chain, 0, whole) for block in span]

    def _matched(self, blocks: Sequence[int]) -> list[int]:
        """Blocks that each engine is thought to hold, up to the first that none does."""
        matched = [0] * len(self._latest)
        for block in blocks:
            holders = self._holders.get(block)
            if not holders:
                break
            for index in holders:
                matched[index] += 1
        return matched

    def _add(self, blocks: Sequence[int], instance: Instance) -> None:
        latest = self._latest[instance.index]
        for block in blocks:
            latest[block] = None
            latest.move_to_end(block)
            self._holders.setdefault(block, set()).add(instance.index)
        for block in list(islice(latest, max(0, len(latest) - instance.blocks_total))):
            del latest[block]
            self._holders[block].discard(instance.index)
            if not self._holders[block]:
                del self._holders[block]


def dynamo_cost(
    prompt_tokens: int, *, cached_blocks: int, prefill_tokens: int, active_blocks: int, new_blocks: int
) -> float:
    """Cost of an engine in KV blocks: prefill that is due there with this prompt, and blocks that decode there.

    `prefill_tokens` is what was routed there and has no token yet; `active_blocks` are held by requests there, and
    `new_blocks` would be added.
    """
    prefill_blocks = max(0.0, (prefill_tokens + prompt_tokens) / BLOCK_TOKENS - cached_blocks)
    return prefill_blocks + active_blocks + new_blocks


class DynamoKv(Policy):
    """Least cost, ties at random: NVIDIA Dynamo's KV router with its defaults.

    What engines have cached it knows from their events. Work in flight is its own count: prompts without their
    cached part until the first token, blocks of prompts until the end.
    """

    name = "dynamo-kv"

    def attach(self, cluster: Fleet) -> None:
        super().attach(cluster)
        number = len(cluster.instances)
        self._prefill_tokens = [0] * number
        self._active: list[dict[int, int]] = [{} for _ in range(number)]
        self._partial = [0] * number
        self._routed: dict[SimRequest, int] = {}

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        instances = self.cluster.instances
        whole = request.prompt_tokens // BLOCK_TOKENS
        cached = [instance.cached_blocks(request.chain, whole) for instance in instances]
        costs = [
            dynamo_cost(
                request.prompt_tokens,
                cached_blocks=cached[i],
                prefill_tokens=self._prefill_tokens[i],
                active_blocks=len(self._active[i]) + self._partial[i],
                new_blocks=-(-request.prompt_tokens // BLOCK_TOKENS)
                - num_leading(request.chain, whole, self._active[i]),
            )
            for i in range(len(instances))
        ]
        least = min(costs)
        equal = [i for i, cost in enumerate(costs) if cost == least]
        chosen = equal[int(self.cluster.rng.integers(len(equal)))]
        self._routed[request] = uncached = request.prompt_tokens - cached[chosen] * BLOCK_TOKENS
        self._prefill_tokens[chosen] += uncached
        self._count(request, chosen, 1)
        self.cluster.push(request, instances[chosen])

    def on_started(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """Their prefill is no longer due."""
        for request in requests:
            self._prefill_tokens[instance.index] -= self._routed.pop(request, 0)

    def on_finished(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """Their blocks are no longer active."""
        for request in requests:
            self._count(request, instance.index, -1)

    def _count(self, request: SimRequest, index: int, change: int) -> None:
        """Prompt blocks of active requests; those without known content, or not full, have no other owner."""
        active = self._active[index]
        named = 0
        for span in part_of(request.chain, 0, request.prompt_tokens // BLOCK_TOKENS):
            named += len(span)
            for block in span:
                owners = active.get(block, 0) + change
                if owners:
                    active[block] = owners
                else:
                    del active[block]
        self._partial[index] += change * (-(-request.prompt_tokens // BLOCK_TOKENS) - named)


class SessionSticky(Policy):
    """The first request of a session goes to the engine with the fewest requests, all later ones follow it."""

    name = "session-sticky"

    def attach(self, cluster: Fleet) -> None:
        super().attach(cluster)
        self._home: dict[int, Instance] = {}

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        least = min(self.cluster.instances, key=lambda instance: instance.num_requests)
        home = least if request.session is None else self._home.setdefault(request.session, least)
        self.cluster.push(request, home)
