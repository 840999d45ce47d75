"""Traffic knowledge of simulated L4: learned rates, latest output lengths, latest finished requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from l4queue.cost.step import StepCost
from l4queue.planning.histogram import Buckets, Counts, counts_of, merge
from l4queue.planning.traffic_change import Learned, is_early_round, learn, with_decision, work_ms
from l4queue.policy.output_lengths import KNOWN_OUTPUTS, OutputLengths
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest

__all__ = ("Traffic",)

_MAX_TOKENS = 262_144
"""Begin of the last bucket at the latest, tokens. Chosen: twice the context of Llama-3.1; the last bucket has no
end."""


class Traffic:
    """Counters as the live system keeps them. Nothing in here looks at the output length of what still runs."""

    def __init__(self, *, half_life_s: float) -> None:
        self.buckets = Buckets.log_spaced(_MAX_TOKENS)
        self.learned = Learned.nothing(self.buckets, now_s=0.0)
        self.recent: deque[SimRequest] = deque(maxlen=KNOWN_OUTPUTS)
        self.learned_s = 0.0
        self._half_life_s = half_life_s
        self._prompts: list[int] = []
        self._grown: list[tuple[int, int]] = []
        self._seen: dict[SimRequest, int] = {}
        self.outputs = OutputLengths(size=KNOWN_OUTPUTS)

    def arrived(self, request: SimRequest) -> None:
        """Count a prompt."""
        self._prompts.append(request.prompt_tokens)

    def finished(self, requests: Sequence[SimRequest]) -> None:
        """Lengths that are known now."""
        self.outputs.add(request.generated for request in requests)
        for request in requests:
            self.recent.append(request)
            self._grown.append((self._seen.pop(request, request.prompt_tokens), request.length))

    @property
    def counts(self) -> Counts:
        """Source of the demand."""
        return self.learned.counts

    def learn(self, instances: Sequence[Instance], now_s: float, *, cost: StepCost) -> None:
        """Add what happened since the last round to what was learned."""
        elapsed_s = now_s - self.learned_s
        self.learned_s = now_s
        for instance in instances:
            for request, length in instance.decoding_lengths():
                seen = self._seen.get(request, request.prompt_tokens)
                if length > seen:
                    self._grown.append((seen, length))
                    self._seen[request] = length
        buckets, grown = self.buckets, np.array(self._grown, dtype=np.float64).reshape(-1, 2)
        arrived = self._arrived(elapsed_s)
        steps = counts_of(buckets, grown[:, 0], grown[:, 1] - grown[:, 0])
        fresh = replace(arrived, decode_steps=steps.decode_steps, context_tokens=steps.context_tokens)
        work = work_ms(merge(self.counts, fresh), buckets=buckets, cost=cost)
        self.learned = learn(self.learned, fresh, now_s=now_s, half_life_s=self._half_life_s, work=work)
        self._prompts, self._grown = [], []

    def is_early_round(self, now_s: float, *, num_unfinished: int, cost: StepCost) -> bool:
        """Whether planning should not wait for its period."""
        if self.learned_s:
            return False
        fresh = self._arrived(now_s)
        work = work_ms(fresh, buckets=self.buckets, cost=cost)
        return is_early_round(self.learned, fresh, num_unfinished=num_unfinished, work=work)

    def _arrived(self, elapsed_s: float) -> Counts:
        return counts_of(self.buckets, self._prompts, np.zeros(len(self._prompts)), observed_s=elapsed_s)

    def decided(self) -> None:
        """A decision was made on what is known now."""
        self.learned = with_decision(self.learned)
