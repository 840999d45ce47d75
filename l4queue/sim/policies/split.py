"""Splits of prefill and decode: prompts run on some engines, outputs on the others; KV caches move between.

As in the disaggregated serving of vLLM, SGLang, Dynamo and llm-d (docs/routers.md). How many engines prefill is
chosen once (`l4queue.sim.tuning`), or follows the load. A prompt goes where little prefill is due and much of it
is cached, and waits there in order. After its first token it goes to the decoding engine that is lightest.
"""

from __future__ import annotations

from collections.abc import Sequence

from l4queue.policy.loads import running_work_ms
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.prefixes import Prefixes
from l4queue.sim.policy import Fleet, Policy

__all__ = ("LoadSplit", "PrefillSplit")

_OWN_WEIGHT = 8.0
"""A ms of a prompt's own prefill against one that is due before it. Simulated: of 1, 2, 4 and 8 the best on both
traces of Mooncake, since prefixes that stay together spare later ones, too."""
_PERIOD_S, _HALF_LIFE_S = 10.0, 120.0
"""Between two looks at the load, and the age at which work counts half: as the planner of l4queue has them."""


class PrefillSplit(Policy):
    """The first `num_prefill` engines prefill, the others decode. With no engine on one side all do both."""

    name = "split"

    def __init__(self, *, num_prefill: int) -> None:
        self.num_prefill = num_prefill

    def attach(self, cluster: Fleet) -> None:
        """Give each engine its role."""
        super().attach(cluster)
        instances = cluster.instances
        self._is_split = 0 < self.num_prefill < len(instances)
        self._prefilling = list(instances[: self.num_prefill] if self._is_split else instances)
        self._decoding = list(instances[self.num_prefill :])
        self._prefixes = Prefixes(instances, cost=cluster.cost)
        self._sent: dict[SimRequest, int] = {}  # engine that a request decodes on, or is on its way to
        self._num_sent = [0] * len(instances)
        self._sent_tokens = [0] * len(instances)

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """To the prefilling engine with the least prefill due, the own uncached one weighted."""
        held = {i.index: self._prefixes.held_tokens(request, i) for i in self._prefilling}
        prefill_ms = self.cluster.cost.prefill_ms

        def due_ms(instance: Instance) -> tuple[float, int]:
            own_ms = prefill_ms(request.length, held[instance.index])
            return self._prefixes.due_ms(instance) + _OWN_WEIGHT * own_ms, instance.num_requests

        chosen = min(self._prefilling, key=due_ms)
        self._prefixes.taken(request, held[chosen.index])
        self.cluster.push(request, chosen)

    def on_started(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """They have their first token: on to an engine that decodes."""
        self._prefixes.started(requests)
        if not self._is_split:
            return
        for request in requests:
            if request.finish_s is None:
                target = min(self._decoding, key=self._step_ms)
                self._sent[request] = target.index
                self._num_sent[target.index] += 1
                self._sent_tokens[target.index] += request.length
                if target is not instance:
                    self.cluster.ask_back(request, instance, target)

    def on_removed(self, instance: Instance, request: SimRequest, tag: object, now_s: float) -> None:
        """Released by the engine that prefilled it."""
        assert isinstance(tag, Instance)
        self.cluster.send(request, tag)

    def on_finished(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """Their engine is lighter."""
        for request in requests:
            index = self._sent.pop(request, None)
            if index is not None:
                self._num_sent[index] -= 1
                self._sent_tokens[index] -= request.prompt_tokens + 1

    def _step_ms(self, instance: Instance) -> float:
        """Time of a decode step with all that was sent there, without the tokens that came since."""
        cost, index = self.cluster.cost, instance.index
        return cost.beta_ms * self._num_sent[index] + cost.gamma_ms * self._sent_tokens[index]


class LoadSplit(PrefillSplit):
    """As many engines prefill as make both parts equally busy with the work that was seen.

    Prefill counts without what was cached. Every ten seconds one engine may change its role: the one with the
    least to do in its old role, which it brings to an end. The fleet begins with half of its engines for each.
    """

    name = "split-by-load"
    tick_s = _PERIOD_S

    def __init__(self) -> None:
        super().__init__(num_prefill=0)
        self._prefill_ms = self._decode_ms = 0.0

    def attach(self, cluster: Fleet) -> None:
        """Half of the engines prefill."""
        self.num_prefill = len(cluster.instances) // 2
        super().attach(cluster)

    @property
    def num_prefilling(self) -> int:
        """Engines that prefill now."""
        return len(self._prefilling)

    def on_started(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """Their prefill is work that was seen."""
        prefill_ms = self.cluster.cost.prefill_ms
        self._prefill_ms += sum(prefill_ms(r.prompt_tokens, r.cached_tokens or 0) for r in requests)
        super().on_started(instance, requests, now_s)

    def on_finished(self, instance: Instance, requests: Sequence[SimRequest], now_s: float) -> None:
        """So are their outputs: each token its share of a step of as many like it as an engine holds."""
        cost = self.cluster.cost
        for request in requests:
            batch = max(1.0, min(cost.max_num_seqs, cost.kv_capacity_tokens / request.length))
            steps, tokens = request.generated - 1, request.prompt_tokens
            own_ms = running_work_ms(1, tokens, expected_remaining_tokens=steps, cost=cost)
            self._decode_ms += own_ms + steps * cost.alpha_ms / batch
        super().on_finished(instance, requests, now_s)

    def on_tick(self, now_s: float) -> None:
        """One engine changes its role where the shares of the work ask for it."""
        if not self._is_split or not self._prefill_ms + self._decode_ms:
            return
        number = len(self.cluster.instances)
        wanted = min(range(1, number), key=lambda n: max(self._prefill_ms / n, self._decode_ms / (number - n)))
        if wanted > len(self._prefilling):
            freed = min(self._decoding, key=self._step_ms)
            self._decoding.remove(freed)
            self._prefilling.append(freed)
        elif wanted < len(self._prefilling):
            freed = min(self._prefilling, key=self._prefixes.due_ms)
            self._prefilling.remove(freed)
            self._decoding.append(freed)
        fading = 0.5 ** (_PERIOD_S / _HALF_LIFE_S)
        self._prefill_ms *= fading
        self._decode_ms *= fading
