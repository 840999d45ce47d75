"""The queue of a simulated L4 stage: requests end before a prefill that would hold them up longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from l4queue.policy.admission import max_prefill_ms
from l4queue.policy.output_lengths import OutputLengths
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.central import Pool
from l4queue.sim.wake import WakeRace

__all__ = ("StagePool",)


class StagePool(Pool):
    """A pool whose engines have room for a prompt only if their batch can bear its prefill (`max_prefill_ms`)."""

    __slots__ = ("_outputs",)

    def __init__(
        self,
        instances: Sequence[Instance],
        *,
        score: Callable[[SimRequest], float],
        race: WakeRace,
        outputs: OutputLengths,
    ) -> None:
        super().__init__(instances, score=score, race=race)
        self._outputs = outputs

    def has_room(self, instance: Instance, request: SimRequest) -> bool:
        """As in any pool, and what runs there can bear it."""
        if not super().has_room(instance, request):
            return False
        if not instance.num_requests or request.has_kv:
            return True
        bearable_ms = max_prefill_ms(
            instance.num_requests,
            instance.context_tokens,
            remaining_tokens=self._outputs.mean_tokens,
            num_waiting=len(self) / max(1, len(self.instances)),
            cost=instance.cost,
        )
        return instance.cost.prefill_ms(request.length) <= bearable_ms
