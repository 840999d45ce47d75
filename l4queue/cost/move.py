"""Price of moving a running request: prefill again, or send its KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from l4queue.cost.step import StepCost

__all__ = ("DEFAULT_LINK_GB_PER_S", "MovePrice")

DEFAULT_LINK_GB_PER_S = 0.0
"""Link of `l4queue simulate` and of the reproduction's tables unless they name one, GB/s; 0: prefill again.
Chosen: it promises nothing that a fleet may not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePrice:
    """Price of a move. Without a bandwidth the target prefills the whole context again.

    `kv_bytes_per_token` is 2 · layers · KV heads · head size · bytes per value: 131,072 for Llama-3.1-8B in
    16 bits. `fixed_ms` is what every move takes besides: release, queue, claim. `room_bytes` is the room for KV
    caches on their way; None: without bound. A request with a larger one is prefilled again.
    """

    bandwidth_bytes_per_s: float | None = None
    kv_bytes_per_token: int = 131_072
    fixed_ms: float = 20.0
    room_bytes: int | None = None

    def is_sent(self, length_tokens: float) -> bool:
        """Whether the KV cache of a request of this length comes with it."""
        if self.bandwidth_bytes_per_s is None:
            return False
        return self.room_bytes is None or length_tokens * self.kv_bytes_per_token <= self.room_bytes

    def after(self, length_tokens: int) -> MovePrice:
        """The price of another move, while the KV cache of one of this length is on its way."""
        if self.room_bytes is None or not self.is_sent(length_tokens):
            return self
        return replace(self, room_bytes=self.room_bytes - length_tokens * self.kv_bytes_per_token)

    def work_ms(self, length_tokens: float, cost: StepCost, *, held_tokens: float = 0) -> float:
        """Time that the target's batch loses, ms; `held_tokens` are in its prefix cache already."""
        if self.is_sent(length_tokens):
            return 0.0
        return cost.prefill_ms(length_tokens, held_tokens)

    def transit_ms(self, length_tokens: float) -> float:
        """Time on the way: until the target has its KV cache, or knows of it at all, ms."""
        return self.fixed_ms + self.copy_ms(length_tokens)

    def copy_ms(self, length_tokens: float) -> float:
        """Time that the links of both ends are taken, ms; 0 where no KV cache is sent."""
        if self.bandwidth_bytes_per_s is None or not self.is_sent(length_tokens):
            return 0.0
        return 1000.0 * length_tokens * self.kv_bytes_per_token / self.bandwidth_bytes_per_s

    def delay_ms(self, length_tokens: float, cost: StepCost, *, held_tokens: float = 0) -> float:
        """Time for which the moved request itself makes no token, on an idle target, ms."""
        return self.transit_ms(length_tokens) + self.work_ms(length_tokens, cost, held_tokens=held_tokens)
