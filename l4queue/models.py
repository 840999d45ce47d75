"""Values of the field: requests, their states and transitions, plans, loads. No I/O, no clock."""

from __future__ import annotations

import json
import sys
from array import array
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from l4queue.compat import MAX_NUMBER
from l4queue.plain_values import plain_value, plain_values
from l4queue.sampling import LIST_AS_TUPLE, SamplingParams, Strict
from l4queue.strict_json import MAX_NESTING, check_json, check_text

__all__ = (
    "TERMINAL",
    "TRANSITIONS",
    "UNBOUNDED_TOKENS",
    "ChatMessage",
    "Plan",
    "RequestBody",
    "RequestSpec",
    "RequestState",
    "Routing",
    "SamplingParams",
    "StagePlan",
    "Transition",
    "WorkerLoad",
)

UNBOUNDED_TOKENS = MAX_NUMBER
"""No bound, tokens: the largest whole number that Lua, JSON and floats hold exactly."""

MAX_PROMPT_BYTES = 16 * 2**20
"""Longest prompt accepted, bytes of UTF-8: far above what any model holds, far below what hurts Redis."""


MAX_METADATA_BYTES = 65_536
"""Largest metadata accepted, bytes of its JSON: it is read back with every result."""

_SHORT_BYTES = 256  # of a body that is kept when it was read. Chosen: parameters fit, 1,024 of them are no memory


class RequestState(StrEnum):
    """Where a request is in its life. Terminal states never change again."""

    #: accepted, on the inbox stream, not yet counted and routed
    SUBMITTED = "submitted"
    #: in a stage queue (or the solo queue), owned by nobody
    QUEUED = "queued"
    #: leased by one worker incarnation under the current epoch
    RUNNING = "running"
    #: finished; the result is stored
    DONE = "done"
    #: refused as bad input, or not computable
    FAILED = "failed"
    #: ended by the client, Flower or the CLI
    CANCELLED = "cancelled"
    #: its deadline passed first
    EXPIRED = "expired"
    #: crashed its worker again and again while running alone
    DEAD = "dead"


TERMINAL = frozenset(
    {
        RequestState.DONE,
        RequestState.FAILED,
        RequestState.CANCELLED,
        RequestState.EXPIRED,
        RequestState.DEAD,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One edge of the state machine; `script` is the Lua file that performs it."""

    source: RequestState | None
    target: RequestState
    script: str
    why: str


_S = RequestState
TRANSITIONS: tuple[Transition, ...] = (
    Transition(source=None, target=_S.SUBMITTED, script="submit", why="a client enqueues"),
    Transition(source=_S.SUBMITTED, target=_S.QUEUED, script="route", why="a dispatcher counts and routes"),
    Transition(source=_S.SUBMITTED, target=_S.RUNNING, script="route", why="a ready worker runs nothing"),
    Transition(source=_S.SUBMITTED, target=_S.FAILED, script="refuse", why="it can never run"),
    Transition(source=_S.QUEUED, target=_S.RUNNING, script="take", why="a worker with room takes it"),
    Transition(source=_S.RUNNING, target=_S.QUEUED, script="release", why="a worker gives it back or moves it"),
    Transition(source=_S.RUNNING, target=_S.DEAD, script="release", why="it killed its engine while alone"),
    Transition(source=_S.RUNNING, target=_S.QUEUED, script="retire", why="its worker leaves"),
    Transition(source=_S.RUNNING, target=_S.QUEUED, script="repair", why="no lease was found (alarm)"),
    Transition(source=_S.RUNNING, target=_S.QUEUED, script="reap", why="its worker's lease ran out"),
    Transition(source=_S.RUNNING, target=_S.DEAD, script="reap", why="it killed its worker while alone"),
    Transition(source=_S.RUNNING, target=_S.DONE, script="settle", why="generation finished"),
    Transition(source=_S.RUNNING, target=_S.FAILED, script="settle", why="the engine cannot compute it"),
    Transition(source=_S.SUBMITTED, target=_S.CANCELLED, script="cancel", why="somebody cancels"),
    Transition(source=_S.QUEUED, target=_S.CANCELLED, script="cancel", why="somebody cancels"),
    Transition(source=_S.RUNNING, target=_S.CANCELLED, script="cancel", why="somebody cancels"),
    Transition(source=_S.SUBMITTED, target=_S.EXPIRED, script="expire", why="its deadline passed"),
    Transition(source=_S.QUEUED, target=_S.EXPIRED, script="expire", why="its deadline passed"),
    Transition(
        source=_S.QUEUED, target=_S.EXPIRED, script="take", why="its deadline passed before a worker took it"
    ),
    Transition(source=_S.RUNNING, target=_S.EXPIRED, script="expire", why="its deadline passed"),
)


class ChatMessage(Strict):
    """One chat message; the model's own template renders the list."""

    model_config = ConfigDict(defer_build=True)

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str = Field(max_length=MAX_PROMPT_BYTES)


class RequestBody(Strict):
    """The part of a request that travels as JSON beside its prompt."""

    model_config = ConfigDict(defer_build=True)  # with the client that is made, not with the import

    params: SamplingParams = SamplingParams()
    priority: int = Field(default=0, ge=-100, le=100, description="lower is served first, as in vLLM")
    metadata: dict[str, JsonValue] | None = Field(
        default=None,
        description=f"comes back with the result: at most {MAX_METADATA_BYTES} bytes of JSON, "
        f"{MAX_NESTING} levels, integers of 64 bits",
    )
    traceparent: str | None = Field(
        default=None,
        pattern=r"^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$",
        description="W3C trace context of the caller; spans of the request go below it",
    )

    @classmethod
    def stored(cls, body: str | bytes) -> RequestBody:
        """A body that some client had accepted: what only a newer one knows is ignored. ValidationError else."""
        return _stored(body) if len(body) <= _SHORT_BYTES else cls.model_validate_json(body, extra="ignore")


@lru_cache(maxsize=1024)
def _stored(body: str | bytes) -> RequestBody:
    """Many requests have the same parameters: a short body is read once."""
    return RequestBody.model_validate_json(body, extra="ignore")


_NUMBERS = ("priority", "deadline_s")
_TOKEN_ID = Field(json_schema_extra={"minimum": 0, "maximum": 2**31 - 1})


def _ids_at_once(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """Whole numbers in a list or a tuple as they are: looked at one by one, 100,000 of them take milliseconds."""
    if isinstance(value, list | tuple) and {*map(type, value)} == {int}:
        return tuple(value)
    return check(plain_value(value))


class RequestSpec(RequestBody):
    """One request as its user wrote it. Exactly one of `prompt`, `messages`, `token_ids` is set."""

    prompt: Annotated[str | None, Field(json_schema_extra={"maxLength": MAX_PROMPT_BYTES})] = Field(
        default=None, description=f"text of at most {MAX_PROMPT_BYTES} bytes"
    )
    messages: Annotated[tuple[ChatMessage, ...] | None, LIST_AS_TUPLE] = Field(default=None, max_length=10_000)
    token_ids: Annotated[tuple[Annotated[int, _TOKEN_ID], ...] | None, WrapValidator(_ids_at_once)] = Field(
        default=None, max_length=2_000_000
    )
    deadline_s: float | None = Field(default=None, gt=0.0, le=30 * 86_400.0)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=512)

    @model_validator(mode="before")
    @classmethod
    def _values_are_plain(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {**values, **plain_values({name: values[name] for name in _NUMBERS if name in values})}

    @field_validator("prompt")
    @classmethod
    def _prompt_is_text(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value:
            raise ValueError("the prompt is empty")
        check_text(value)
        size_bytes = len(value.encode())
        if size_bytes > MAX_PROMPT_BYTES:
            raise ValueError(f"the prompt has {size_bytes} bytes; at most {MAX_PROMPT_BYTES} are accepted")
        return value

    @field_validator("metadata", mode="before")
    @classmethod
    def _metadata_is_json_of_bounded_size(cls, value: object) -> object:
        if value is not None:
            check_json(value, max_bytes=MAX_METADATA_BYTES)  # not on the wire: what was accepted before is served
        return value

    @field_validator("token_ids")
    @classmethod
    def _token_ids_are_ids(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and not value:
            raise ValueError("the prompt is empty")
        if value is not None and not _are_ids(value):
            raise ValueError("token ids must lie in [0, 2^31)")
        return value

    @field_validator("messages")
    @classmethod
    def _messages_fit(cls, value: tuple[ChatMessage, ...] | None) -> tuple[ChatMessage, ...] | None:
        if value is not None and not value:
            raise ValueError("the list of messages is empty")
        if value is not None and _encoded_bytes(value) > MAX_PROMPT_BYTES:
            raise ValueError(f"the messages have more than {MAX_PROMPT_BYTES} bytes")
        return value

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> RequestSpec:
        given = [n for n in ("prompt", "messages", "token_ids") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prompt, messages, token_ids (got {given or 'none'})")
        return self


def _are_ids(values: tuple[int, ...]) -> bool:
    """Whether all lie in [0, 2^31): by their highest bytes, a quarter of the time of two comparisons each."""
    try:
        packed = array("I", values).tobytes()
    except OverflowError:
        return False
    return packed[3 if sys.byteorder == "little" else 0 :: 4].isascii()


def _encoded_bytes(messages: tuple[ChatMessage, ...]) -> int:
    """Bytes of the contents as they travel, in JSON: that writes a control character in six."""
    size_bytes = sum(len(message.content.encode()) for message in messages)
    if 6 * size_bytes <= MAX_PROMPT_BYTES:
        return size_bytes
    return sum(len(json.dumps(message.content, ensure_ascii=False).encode()) for message in messages)


class Routing(StrEnum):
    """How requests find their worker. All but `l4` are baselines, to be compared with on the same protocol."""

    #: stages by length, late binding, hand-over, stealing; the planner replans
    L4 = "l4"
    #: pushed to the workers in turn, at arrival
    ROUND_ROBIN = "round-robin"
    #: pushed to the worker with least to do
    LEAST_LOADED = "least-loaded"
    #: pushed to one of two pools by prompt length, there to the worker with least to do
    TWO_POOL = "two-pool"
    #: one queue in order of arrival; a worker takes when it has room
    CENTRAL = "central"
    #: one queue, shortest prompt first with ageing
    CENTRAL_SJF = "central-sjf"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of a plan: the workers that serve lengths in the half-open range [low, high)."""

    low_tokens: int
    high_tokens: int | None  # None: no upper end (the last stage)
    num_workers: int
    worker_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Ordered stages that cover [0, ∞) once. `version` rises by one with each publication; 0 is the
    plan of an empty deployment: one stage that everybody serves. Under another `routing` than `l4` the planner
    rests, and workers neither steal nor hand over. With `prefix_affinity` there is one stage, and requests go
    where their prompt is cached (docs/prefix-affinity.md)."""

    version: int
    stages: tuple[StagePlan, ...]
    reason: str = ""
    created_ms: int = 0
    objective: float | None = None
    objective_one_stage: float | None = None
    routing: Routing = Routing.L4
    prefix_affinity: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def one_stage(cls, *, version: int = 0, num_workers: int = 0, reason: str = "no plan yet") -> Plan:
        """The plan without partition: one stage for all lengths."""
        stage = StagePlan(low_tokens=0, high_tokens=None, num_workers=num_workers)
        return cls(version=version, stages=(stage,), reason=reason)

    @property
    def highs(self) -> tuple[int, ...]:
        """Upper ends of all stages but the last, ascending, tokens."""
        return tuple(stage.high_tokens for stage in self.stages if stage.high_tokens is not None)

    def goes_by_prefix(self, setting: str) -> bool:
        """Whether requests go where their prompt is cached, with this setting (`Settings.prefix_affinity`)."""
        return self.prefix_affinity if setting == "auto" else setting == "true"

    def stage_of(self, length_tokens: int) -> int:
        """Index of the stage whose range holds the length; a boundary belongs to the upper stage."""
        for index, stage in enumerate(self.stages):
            if stage.high_tokens is None or length_tokens < stage.high_tokens:
                return index
        return len(self.stages) - 1

    def stage_of_worker(self, worker_id: str) -> int | None:
        """Index of the stage that the plan gives this worker, or None when it does not know it."""
        for index, stage in enumerate(self.stages):
            if worker_id in stage.worker_ids:
                return index
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """A worker's published state, as of one heartbeat."""

    worker_id: str
    incarnation: str = ""
    stage: int = 0
    num_running: int = 0  # all requests that it has taken, also the ones that wait in its engine
    num_waiting_in_engine: int = 0
    context_tokens: int = 0  # of all of them
    pending_prefill_tokens: int = 0  # of prompts that have no token yet, without what its prefix cache holds
    longest_prefill_tokens: int = 0  # of one of them
    prefill_due_ms: float = 0.0  # prefill of all of them, each by itself
    copies_due_ms: float = 0.0  # KV caches on their way out of its engine and into it, one after the other
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    max_running: int = 0
    step_ms: float = 0.0
    tokens_per_s: float = 0.0
    is_draining: bool = False
    engine: str = ""
    num_finished: int = 0
    num_preemptions: int = 0  # requests that the engine put back for want of KV blocks
    is_emptying: bool = False  # takes nothing: runs empty for a request that is to run alone, or runs one
    max_model_len: int = 0  # longest prompt + output that its engine holds, tokens; 0: it does not tell
    can_empty: bool = False  # tells `is_emptying`; workers of an older release do not
    num_prompt_tokens: int = 0  # of requests that began here and whose engine told of its prefix cache
    num_cached_tokens: int = 0  # of these, found in it
    kv_budget_bytes: int | None = None  # room on its host for KV caches on their way; None: it tells of no bound
    models: tuple[str, ...] = ()  # names of the model that it serves, the usual one first; empty: it does not tell

    @property
    def is_open(self) -> bool:
        """Whether it takes work: what goes to one that does not waits there for nothing."""
        return not (self.is_draining or self.is_emptying)

    @property
    def kv_share(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self.kv_used_tokens / self.kv_capacity_tokens if self.kv_capacity_tokens else 0.0
