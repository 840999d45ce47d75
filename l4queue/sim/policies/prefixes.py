"""What simulated L4 knows of prefix caches: who holds what of a request, and the prefill that is really due."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.views import load_of, worker_id

__all__ = ("Prefixes",)

_KEPT = 0.999
"""Part of what is known of hits that the next request leaves: about the latest thousand count."""


class Prefixes:
    """Beliefs about caches, as live workers would have them from KV events; prefill due by what they found.

    A prompt is due in full, without what its engine was believed to hold when it took it, until its first token.
    """

    def __init__(self, instances: Sequence[Instance], *, cost: StepCost) -> None:
        self._by_id = {worker_id(instance): instance for instance in instances}
        self._cost = cost
        self._noted: dict[SimRequest, int] = {}  # tokens that its engine was believed to hold
        self._found_tokens = self._prompt_tokens = 0.0

    def held_tokens(self, request: SimRequest, instance: Instance) -> int:
        """Leading tokens of a request's context that an engine holds now."""
        block_tokens = instance.block_tokens
        return instance.cached_blocks(request.chain, (request.length - 1) // block_tokens) * block_tokens

    def held_by_all(self, request: SimRequest) -> dict[str, int]:
        """Of all engines, by worker."""
        return {name: self.held_tokens(request, instance) for name, instance in self._by_id.items()}

    def held_elsewhere(self, request: SimRequest) -> Mapping[str, int]:
        """The same, each looked up when asked for: a move is weighed with few of them."""
        return _Held(request, self)

    def held_at(self, request: SimRequest, name: str) -> int:
        """Of the engine of this worker."""
        return self.held_tokens(request, self._by_id[name])

    def taken(self, request: SimRequest, held_tokens: int) -> None:
        """An engine takes it, which holds so much of it."""
        self._noted[request] = held_tokens

    def started(self, requests: Sequence[SimRequest]) -> None:
        """They have their first token, and their engines tell what they found."""
        for request in requests:
            self._noted.pop(request, None)
            self._found_tokens = _KEPT * self._found_tokens + (request.cached_tokens or 0)
            self._prompt_tokens = _KEPT * self._prompt_tokens + request.prompt_tokens

    @property
    def workers(self) -> Collection[str]:
        """All of them."""
        return self._by_id.keys()

    @property
    def hit_share(self) -> float:
        """Share of prompt tokens found lately."""
        return self._found_tokens / self._prompt_tokens if self._prompt_tokens else 0.0

    def due_ms(self, instance: Instance) -> float:
        """Prefill due in an engine, ms, each prompt by itself."""
        return sum(self._cost.prefill_ms(r.length, self._noted.get(r, 0)) for r in instance.untouched())

    def due_tokens(self, instance: Instance) -> list[int]:
        """Tokens of each prompt that is due."""
        return [r.length - self._noted.get(r, 0) for r in instance.untouched()]

    def load_of(self, instance: Instance) -> WorkerLoad:
        """The load that its worker would publish: only uncached tokens are pending."""
        load = load_of(instance)
        if not load.pending_prefill_tokens:
            return load
        return replace(load, pending_prefill_tokens=sum(self.due_tokens(instance)))


class _Held(Mapping[str, int]):
    """Leading tokens of one request that each worker holds."""

    __slots__ = ("_prefixes", "_request")

    def __init__(self, request: SimRequest, prefixes: Prefixes) -> None:
        self._request, self._prefixes = request, prefixes

    def __getitem__(self, name: str) -> int:
        return self._prefixes.held_at(self._request, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._prefixes.workers)

    def __len__(self) -> int:
        return len(self._prefixes.workers)
