"""Redis contents as values: packed token ids, records, grants, outcomes, output entries."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from l4queue.compat import MAX_NUMBER, object_of
from l4queue.errors import UnreadableValue
from l4queue.models import UNBOUNDED_TOKENS, RequestState
from l4queue.value_class import value_class

__all__ = (
    "NO_QUOTA",
    "BackgroundQuota",
    "CachedPrompt",
    "Followed",
    "Grant",
    "NewsEntry",
    "Outcome",
    "OutputEntry",
    "RequestRecord",
    "TokenLogprobs",
    "id_array",
    "pack_ids",
    "pack_logprobs",
    "unpack_ids",
    "unpack_logprobs",
)

_ID_TYPE = "I"  # 4 bytes on every platform CPython supports


_STATES = {state.value.encode(): state for state in RequestState}


def _state(raw: bytes) -> RequestState:
    """The state of this name; ValueError where there is none. Ten times as fast as a call of the enumeration."""
    return _STATES.get(raw) or RequestState(raw.decode())


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian unsigned 32-bit integers: 4 bytes a token, order kept."""
    packed = array(_ID_TYPE, token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def id_array(data: bytes) -> array[int]:
    """The inverse of `pack_ids`, in memory as small. ValueError when the length is no multiple of 4 bytes."""
    unpacked = array(_ID_TYPE)
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked


def unpack_ids(data: bytes) -> list[int]:
    """The same as a list."""
    return id_array(data).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """The logarithm of the probability of one generated token, and of the most probable ones.

    `top` has as many (token id, logprob) as were asked for, most probable first; the token itself may be one.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def pack_logprobs(rows: Sequence[TokenLogprobs]) -> bytes:
    """All ids, row by row, then all logprobs as floats of 32 bits: 8 bytes for a token and for each of its `top`.

    ValueError when the rows have not as many `top` each.
    """
    if len({len(row.top) for row in rows}) > 1:
        raise ValueError("rows of logprobs differ in length")
    ids = [token for row in rows for token in (row.token_id, *(token for token, _ in row.top))]
    values = array("f", [value for row in rows for value in (row.logprob, *(value for _, value in row.top))])
    if sys.byteorder == "big":
        values.byteswap()
    return pack_ids(ids) + values.tobytes()


def unpack_logprobs(data: bytes, num_tokens: int) -> tuple[TokenLogprobs, ...]:
    """The inverse of `pack_logprobs` for this number of tokens. ValueError when the length does not fit it."""
    if not num_tokens or len(data) % (8 * num_tokens):
        raise ValueError(f"{len(data)} bytes are not the logprobs of {num_tokens} tokens")
    half, width = len(data) // 2, len(data) // (8 * num_tokens)
    values = array("f")
    values.frombytes(data[half:])
    if sys.byteorder == "big":
        values.byteswap()
    pairs = list(zip(unpack_ids(data[:half]), values, strict=True))
    rows = (pairs[start : start + width] for start in range(0, len(pairs), width))
    return tuple(TokenLogprobs(token_id=row[0][0], logprob=row[0][1], top=tuple(row[1:])) for row in rows)


@value_class(kw_only=True)
class CachedPrompt:
    """Prompt tokens that an engine found in its prefix cache, and that it put there; None: it does not say."""

    found_tokens: int
    made_tokens: int | None = None

    def pack(self) -> str:
        """As it is stored."""
        return str(self.found_tokens) if self.made_tokens is None else f"{self.found_tokens} {self.made_tokens}"

    @classmethod
    def parse(cls, data: bytes | None) -> CachedPrompt | None:
        """The inverse; None where nothing, or nothing readable, is told."""
        parts = (data or b"").split()
        if not 1 <= len(parts) <= 2 or not all(part.isdigit() and len(part) <= 15 for part in parts):
            return None
        return cls(found_tokens=int(parts[0]), made_tokens=int(parts[1]) if len(parts) == 2 else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundQuota:
    """How `take` treats background requests.

    While another request came to the taker's stage less than `for_ms` ago (the beginning of the clock where none
    ever did) it takes at most `max_requests` of them,
    none longer than `longest_tokens`. One that has waited `overdue_ms` longer than its place in the order says
    counts as any other.
    """

    for_ms: float = 0.0
    max_requests: int = 0
    longest_tokens: int = UNBOUNDED_TOKENS
    overdue_ms: float = 0.0


NO_QUOTA = BackgroundQuota()


@value_class(kw_only=True)
class Grant:
    """A lease on one request: what a worker needs to compute it from `offset` on."""

    request_id: str
    epoch: int
    body: bytes
    packed_ids: bytes
    offset: int
    prompt_tokens: int
    crashes: int
    score: float
    submitted_ms: int
    deadline_ms: int | None
    stage: str
    came_from: str = ""  # the worker that had it before
    kv: str = ""  # ticket of its KV cache, from a hand-over
    is_background: bool = False  # nobody waits for it; one that has waited for too long is no longer background

    @classmethod
    def parse(cls, row: Sequence[bytes]) -> Grant:
        """From one row of the reply of `take`."""
        return cls(
            request_id=row[0].decode(),
            epoch=int(row[1]),
            body=row[2],
            packed_ids=row[3],
            offset=int(row[4]),
            prompt_tokens=int(row[5]),
            crashes=int(row[6]),
            score=float(row[7]),
            submitted_ms=int(row[8]),
            deadline_ms=int(row[9]) or None,
            stage=row[10].decode(),
            came_from=row[11].decode(errors="replace"),
            kv=row[12].decode(errors="replace"),
            is_background=row[13] == b"1",
        )


@value_class(kw_only=True)
class Outcome:
    """The one ending that a worker writes. `held_text` is text kept back until the end was known."""

    state: RequestState
    finish_reason: str = ""
    error: str = ""
    field: str = ""
    held_text: str = ""


@value_class(kw_only=True)
class OutputEntry:
    """One entry of an output stream. `upto` tokens exist after it; `state` is set by the end marker.

    `cached` comes with the first tokens, where the engine told it by then.
    """

    upto: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    state: RequestState | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cached: CachedPrompt | None = None

    @classmethod
    def parse(cls, entry_id: bytes, values: Mapping[bytes, bytes]) -> OutputEntry:
        """From one stream entry, whose id begins with the token offset after it.

        UnreadableValue, or another ValueError, where no worker can have written it.
        """
        state, logprobs, packed_ids, cached = map(values.get, (b"e", b"l", b"t", b"k"))
        upto, _, kind = entry_id.partition(b"-")
        token_ids = tuple(id_array(packed_ids)) if packed_ids else ()
        if kind != (b"1" if state else b"0") or len(token_ids) > int(upto) or not (state or token_ids):
            raise UnreadableValue("no entry of an output")
        return cls(
            upto=int(upto),
            token_ids=token_ids,
            text=values.get(b"x", b"").decode(),
            state=_state(state) if state else None,
            logprobs=None if logprobs is None else unpack_logprobs(logprobs, len(token_ids)),
            cached=CachedPrompt.parse(cached) if cached else None,
        )


@value_class(kw_only=True)
class NewsEntry:
    """One entry of a client's news: the number of tokens of a request that exist, or its end.

    `entry` is what was written to the output stream; None where it was too large to be told here.
    """

    request_id: str
    upto: int
    state: RequestState | None
    entry: OutputEntry | None

    @classmethod
    def parse(cls, values: Mapping[bytes, bytes]) -> NewsEntry | None:
        """From one entry of the stream; None for what no worker wrote: news are a hint."""
        state, upto = values.get(b"e"), values.get(b"u", b"")
        try:
            entry_id = upto + (b"-1" if state else b"-0")
            return cls(
                request_id=values[b"i"].decode(),
                upto=int(upto),
                state=_state(state) if state else None,
                entry=OutputEntry.parse(entry_id, values) if b"x" in values else None,
            )
        except (KeyError, ValueError):
            return None

    @classmethod
    def parse_mail(cls, values: Mapping[bytes, bytes]) -> NewsEntry | None:
        """The same from one entry of a mailbox, which tells of an end alone."""
        try:
            return cls(request_id=values[b"i"].decode(), upto=0, state=_state(values[b"s"]), entry=None)
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """Answer to `follow`: state (None: unknown) and number of tokens of each request, those looked at last.

    `is_new`: the news stream did not exist before.
    """

    is_new: bool
    places: tuple[tuple[RequestState | None, int], ...]

    @classmethod
    def parse(cls, reply: Sequence[bytes]) -> Followed:
        """From the reply of the script. A record that nobody can read is unknown, and hides no other."""
        places = tuple(_place(state, upto) for state, upto in zip(reply[1::2], reply[2::2], strict=True))
        return cls(is_new=reply[0] == b"1", places=places)


def _place(state: bytes, upto: bytes) -> tuple[RequestState | None, int]:
    try:
        known = _state(state) if state else None
    except ValueError:
        return None, 0
    return known, int(upto) if upto.isdigit() else 0


@value_class(kw_only=True)
class RequestRecord:
    """The facts of one request, without prompt, token ids and output. Times are server clock, ms."""

    request_id: str
    state: RequestState
    epoch: int = 0
    offset: int = 0
    crashes: int = 0
    stage: str | None = None
    plan: int | None = None
    worker: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt, found in the prefix cache of the engine that began it
    max_tokens: int | None = None
    submitted_ms: int = 0
    queued_ms: int | None = None
    started_ms: int | None = None
    first_token_ms: int | None = None
    finished_ms: int | None = None
    deadline_ms: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    field: str | None = None
    placed: str | None = None  # why its worker took it, where workers choose
    dropped_ms: int | None = None  # when its output went early, for want of room
    body: str = "{}"

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Hash fields to read, in the order that `parse` expects."""
        return _FIELD_NAMES

    @classmethod
    def parse(cls, request_id: str, row: Sequence[bytes | None]) -> RequestRecord | None:
        """From HMGET of `field_names`; None when there is no such record."""
        state, *facts = row
        if not state:
            return None
        values: dict[str, Any] = {}
        for name, raw in zip(_FACTS, facts, strict=True):
            if not raw:
                continue
            if name in _TEXT_FIELDS:
                values[name] = raw.decode("utf-8", "replace")
            elif raw.isdigit() and len(raw) <= _MOST_DIGITS and (number := int(raw)) <= MAX_NUMBER:
                values[name] = number  # what else is there is as good as nothing
        return cls(request_id=request_id, state=_state(state), **values)

    @classmethod
    def told(cls, request_id: str, end: Mapping[bytes, bytes]) -> RequestRecord | None:
        """The same from the end marker of an output; None where that does not tell it, or not any more."""
        return cls.parse(request_id, [*map(end.get, _TOLD_NAMES)]) if b"finished_ms" in end else None

    @property
    def body_fields(self) -> dict[str, Any]:
        """The body as plain values, for what is only passed on; nothing of a body that is no JSON object."""
        try:
            return object_of(self.body, what="body")
        except UnreadableValue:
            return {}

    @property
    def was_resumed(self) -> bool:
        """Whether more than one lease computed it: after a crash, a hand-over or a give-back."""
        return self.epoch > 1

    @property
    def ttft_ms(self) -> int | None:
        """Time to first token: from acceptance to the first token a client could read, ms."""
        return None if self.first_token_ms is None else max(0, self.first_token_ms - self.submitted_ms)

    @property
    def e2e_ms(self) -> int | None:
        """End to end: from acceptance to the stored outcome, ms."""
        return None if self.finished_ms is None else max(0, self.finished_ms - self.submitted_ms)

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first, ms; None with fewer than two tokens."""
        if self.finished_ms is None or self.first_token_ms is None or self.offset < 2:
            return None
        return max(0, self.finished_ms - self.first_token_ms) / (self.offset - 1)


def in_order(*times_ms: int | None) -> tuple[int | None, ...]:
    """Times of a request, none before the one before it: the server's clock may have gone back meanwhile."""
    ordered, latest_ms = list[int | None](), 0
    for time_ms in times_ms:
        latest_ms = latest_ms if time_ms is None else max(latest_ms, time_ms)
        ordered.append(None if time_ms is None else latest_ms)
    return tuple(ordered)


_FACTS = tuple(f.name for f in fields(RequestRecord) if f.name not in ("request_id", "state"))
_FIELD_NAMES = ("state", *_FACTS)
_TOLD_NAMES = (b"e", *(name.encode() for name in _FACTS))
_MOST_DIGITS = len(str(MAX_NUMBER))
_TEXT_FIELDS = frozenset({"stage", "worker", "finish_reason", "error", "field", "placed", "body"})
