"""The cost model: time of one engine step as a linear form of its batch.

t = α + β·n + γ·S + π·p + ψ·A + σ·skew      (milliseconds)

n     requests that decode one token in this step
S     their context tokens, summed
p     prefill tokens of this step
A     Σ chunk·(context before the chunk + chunk/2): query-key pairs of the prefill chunks
skew  how far the longest context stands out: n·(longest - mean), zero when all are equal

Weights are read once per step (α), each request costs its share of the dense layers (β), attention reads
every cached token (γ), prefill computes per token (π) and per pair (ψ). All coefficients are ≥ 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from l4queue.value_class import value_class

__all__ = ("BLOCK_TOKENS", "BatchShape", "StepCost", "max_chunk_tokens")

BLOCK_TOKENS = 16
"""Tokens of one KV block in simulated and emulated engines: vLLM's default `block_size` on CUDA."""
_SHARE_FOR_OTHERS = 16
"""One such part of a step. Chosen: 128 of 2,048 tokens, eight KV blocks; a long prompt has 7 % more steps."""


def max_chunk_tokens(max_batched_tokens: int) -> int:
    """Most tokens of one prompt in a step while there are other requests: vLLM's `long_prefill_token_threshold`.

    What is left of the step lets requests in that bring their KV cache; else they would wait for the whole prompt.
    """
    return max_batched_tokens - max_batched_tokens // _SHARE_FOR_OTHERS


@value_class(kw_only=True)
class BatchShape:
    """Work of one engine step. All counts are ≥ 0."""

    num_decodes: int = 0
    context_tokens: int = 0
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    skew_tokens: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Coefficients of the step-time formula, each ≥ 0, and the limits of the engine they describe.

    Units: ms, ms/request, ms/token, ms/token, ms/pair, ms/token.
    """

    alpha_ms: float
    beta_ms: float
    gamma_ms: float
    pi_ms: float
    psi_ms: float
    sigma_ms: float = 0.0
    kv_capacity_tokens: int = 0
    max_batched_tokens: int = 8192
    max_num_seqs: int = 256

    @property
    def max_chunk_tokens(self) -> int:
        """`max_chunk_tokens` of this engine."""
        return max_chunk_tokens(self.max_batched_tokens)

    def step_ms(self, batch: BatchShape) -> float:
        """Predicted time of one step, ms; 0 for an empty batch."""
        if batch.num_decodes == 0 and batch.prefill_tokens == 0:
            return 0.0
        return (
            self.alpha_ms
            + self.beta_ms * batch.num_decodes
            + self.gamma_ms * batch.context_tokens
            + self.pi_ms * batch.prefill_tokens
            + self.psi_ms * batch.prefill_pairs
            + self.sigma_ms * batch.skew_tokens
        )

    def prefill_ms(self, prompt_tokens: float, cached_tokens: float = 0) -> float:
        """Work of prefilling a prompt alone, ms, without the fixed cost of its steps."""
        new = max(0, prompt_tokens - cached_tokens)
        return self.pi_ms * new + self.psi_ms * new * (cached_tokens + new / 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
