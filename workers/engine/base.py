"""The seam to an inference engine: token ids in, token ids out, in batches. Nothing here knows Redis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from l4queue.models import SamplingParams
from l4queue.protocol.records import CachedPrompt, TokenLogprobs
from l4queue.value_class import value_class

__all__ = (
    "MAX_STEP_RECORDS",
    "Cut",
    "Engine",
    "EngineDied",
    "EngineInfo",
    "EngineOutput",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "StepRecord",
)


class FinishReason(StrEnum):
    """Why a request ended in the engine. What `abort` stops, or a dying engine drops, has no end.

    What is lost has not ended: it goes on from its tokens wherever it is taken next.
    """

    STOP = "stop"  # end of sequence, or one of stop_token_ids
    LENGTH = "length"  # max_tokens generated, or the model's length reached
    ERROR = "error"  # the engine cannot compute this request; `error` says why
    LOST = "lost"  # the engine serves on, and has dropped this request


@value_class(kw_only=True)
class EngineRequest:
    """One request as the engine sees it.

    `token_ids` is the prompt followed by what earlier workers have generated (the last `num_resumed` of
    them); `max_tokens` and `min_tokens` count from here on, so they override those of `params`.
    Stop strings are not the engine's business: the worker finds them in the text.
    `kv` is the ticket of a `Cut`: as many of the `token_ids` as it has KV for, but the last, are loaded and
    not prefilled. Whatever is wrong with a ticket, the request is computed all the same.
    """

    request_id: str
    token_ids: Sequence[int]
    max_tokens: int
    min_tokens: int
    params: SamplingParams
    priority: int = 0
    num_resumed: int = 0
    kv: str = ""


@value_class(kw_only=True)
class EngineOutput:
    """New tokens of one request (possibly none, with a finish reason), with `logprobs` each when asked for.

    `field` is the parameter at fault where `error` is about one. `cached` comes once, at the latest with the end,
    from an engine that tells how much of the request's tokens it found in its prefix cache.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    field: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached: CachedPrompt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A request that was stopped to go on elsewhere.

    `kv` is the ticket of its KV cache for another engine of this host, short ASCII; "" when none was kept.
    """

    kv: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts of an engine, fixed once it has started.

    `kv_bytes_per_token` is the size of the KV cache that a hand-over moves; 0 when it cannot be moved.
    `has_prefix_cache`: what it has served is found again by prompts with the same beginning.
    """

    name: str
    model: str
    version: str
    max_model_len: int
    kv_capacity_tokens: int
    max_running: int
    max_batched_tokens: int
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    kv_bytes_per_token: int = 0
    has_prefix_cache: bool = False

    @property
    def can_move_kv(self) -> bool:
        """Whether `cut` keeps KV and `EngineRequest.kv` is honoured."""
        return self.kv_bytes_per_token > 0


@value_class(kw_only=True)
class EngineStats:
    """State of an engine now. `num_steps` only grows: the proof of progress that renews the lease.

    So do the other counters: requests that the engine put back for want of KV blocks, that loaded their KV,
    or that had a ticket and were prefilled all the same, and bytes read.
    """

    num_running: int
    num_waiting: int
    kv_used_tokens: int
    num_steps: int
    last_step_ms: float
    num_preemptions: int = 0
    num_kv_loads: int = 0
    num_kv_misses: int = 0
    kv_loaded_bytes: int = 0
    kv_bytes_per_s: float = 0.0  # of a KV cache on its way, out and in, as measured here; 0: not yet
    kv_budget_bytes: int | None = None  # room for KV caches on their way while there are none; None: without bound


MAX_STEP_RECORDS = 4096
"""Step records that an engine keeps until they are read; the oldest go first. Chosen: 40 s of steps of 10 ms, far
more than lie between two reads."""


@value_class(kw_only=True)
class StepRecord:
    """One engine step as measured; the shape is that of `l4queue.cost.step.BatchShape`.

    `tokens_per_decode` is above 1 where the engine speculates and drafted tokens were accepted.
    """

    elapsed_ms: float
    num_decodes: int
    context_tokens: int
    prefill_tokens: int
    prefill_pairs: float
    skew_tokens: float
    tokens_per_decode: float = 1.0


class Engine(Protocol):
    """One inference engine on one event loop for life. Not thread-safe."""

    async def start(self) -> EngineInfo:
        """Load and warm up; raises ConfigError when the model or the hardware does not do."""

    async def add(self, request: EngineRequest) -> None:
        """Admit a request. Its fate, even a refusal, arrives through `outputs`.

        An id is free again once its end has come out or it was aborted; ValueError when it is not.
        Raises EngineDied.
        """

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Stop requests; unknown ids are ignored. Nothing more comes out for these ids."""

    async def cut(self, request_id: str) -> Cut | None:
        """Stop a request at a token boundary and keep its KV for another engine of this host.

        Nothing more comes out for the id, as after `abort`. The KV fits every prefix of what it was given and
        has generated. None when it does not run here: unknown, or ended, and then its end comes out. Takes as
        long as the copy, and never longer than some seconds. Raises EngineDied.
        """

    async def outputs(self) -> list[EngineOutput]:
        """Wait until something came out, then return all of it, in order per request.

        Raises EngineDied when the engine can no longer compute.
        """

    def stats(self) -> EngineStats:
        """Load now; cheap."""

    def kv_room_bytes(self) -> int | None:
        """Room that is left for what `cut` keeps for other engines; None: without bound, or it keeps nothing."""

    def step_records(self) -> list[StepRecord]:
        """Steps measured since the last call, oldest first; bounded, the oldest are dropped."""

    async def stop(self) -> None:
        """Stop and free everything; safe to call twice."""


class EngineDied(Exception):
    """The engine is gone; the worker gives its requests back and ends. None of them did it if `is_blameless`."""

    def __init__(self, why: str, *, is_blameless: bool = False) -> None:
        super().__init__(why)
        self.is_blameless = is_blameless
