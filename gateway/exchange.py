"""One HTTP exchange as the gateway's engine sees it: options from headers, the requests behind it, its refusal."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from gateway.refusals import HttpRefusal
from l4queue.client.arguments import checked_id
from l4queue.client.batch.halves import HALF_HEADER, ID_HEADER, Half
from l4queue.client.core import request_id_of
from l4queue.errors import InvalidRequest
from l4queue.models import RequestSpec

__all__ = ("CURRENT", "Exchange", "Position", "begin")

CURRENT: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
_HEX = re.compile(r"[0-9a-f]{32}")
_PLACES = r"\d{1,9}!?(?:,\d{1,9}!?){0,127}"
_EVENT_ID = re.compile(
    rf"(?P<base>[0-9a-z-]{{1,80}})/(?P<before>{_PLACES})/(?P<places>{_PLACES})/(?P<num>\d{{1,6}})"
)
_OPEN_ENDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


Place = tuple[int, bool]
"""How far an output has come: its tokens, and whether it has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """An event of a stream: where all outputs were with it and with the tokens before, and its number since then.

    Some tokens may give several events, so tokens alone do not tell which of them a client has. After the last
    token the two places are the same.
    """

    before: tuple[Place, ...]
    places: tuple[Place, ...]
    num_events: int

    @classmethod
    def parse(cls, before: str, places: str, num_events: str) -> Position:
        """From the parts of an event's id."""
        return cls(before=_parsed(before), places=_parsed(places), num_events=int(num_events))

    @property
    def text(self) -> str:
        """The same as a part of an id."""
        return f"{_written(self.before)}/{_written(self.places)}/{self.num_events}"


def _parsed(text: str) -> tuple[Place, ...]:
    return tuple((int(part.rstrip("!")), part.endswith("!")) for part in text.split(","))


def _written(places: tuple[Place, ...]) -> str:
    return ",".join(f"{tokens}{'!' if ended else ''}" for tokens, ended in places)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """State that the middleware and `QueueEngine.generate` share for one HTTP request.

    `base` is the id of its first request in the queue; further ones add a number. `after` is the position from
    which a stream goes on. `places` grows with the output that was given to the server, `num_taken` counts the
    outputs that it has taken to their end, `num_events` what it said since either changed. Of several prompts the
    server takes output before it has said what it took: `given` has such pieces of each output, `said` how far its
    events have come. `charged` has the prompt tokens of each output that counts against a limit, `limit_headers`
    what is told of it. Where only one `half` is wanted, `asked` is the request, or `base` the id of the one to
    answer.
    """

    base: str
    idempotency_key: str | None = None
    priority: int | None = None
    deadline_s: float | None = None
    traceparent: str | None = None
    caller: str = ""
    is_detached: bool = False
    has_event_ids: bool = False
    has_open_end: bool = False
    after: Position | None = None
    num_prompts: int = 0
    num_outputs: int = 0
    request_ids: dict[int, str] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=dict)
    before: tuple[Place, ...] = ()
    num_taken: int = 0
    num_events: int = 0
    given: dict[int, deque[Place]] = field(default_factory=dict)
    said: dict[int, Place] = field(default_factory=dict)
    refusal: HttpRefusal | None = None
    num_prompt_tokens: int = 0
    is_counted: bool = False
    charging: asyncio.Lock = field(default_factory=asyncio.Lock)
    charged: dict[int, int] = field(default_factory=dict)
    limit_headers: dict[str, str] = field(default_factory=dict)
    half: Half | None = None
    asked: RequestSpec | None = None

    def next_outputs(self, count: int) -> range:
        """Numbers for `count` further outputs of this exchange, which are those of one prompt."""
        self.num_prompts += 1
        first, self.num_outputs = self.num_outputs, self.num_outputs + count
        return range(first, first + count)

    def id_of(self, number: int) -> str:
        """The id of the request in the queue that computes this output, where it has no idempotency key."""
        return self.base if number == 0 else f"{self.base}-{number}"

    def key_of(self, number: int) -> str | None:
        """The idempotency key of that request."""
        if self.idempotency_key is None:
            return None
        return self.idempotency_key if number == 0 else f"{self.idempotency_key}#{number}"

    def cuts_of(self, number: int) -> tuple[Place, Place]:
        """Where an output was before the last event that the client has, and with it."""
        if self.after is None or number >= len(self.after.places) or number >= len(self.after.before):
            return (0, False), (0, False)
        return self.after.before[number], self.after.places[number]

    @property
    def has_several_prompts(self) -> bool:
        """Whether the server merges the outputs of several calls: each of its events is a piece of one output."""
        return self.num_prompts > 1

    def advance(self, given: Mapping[int, Place]) -> None:
        """Note what is given to the server: of some outputs, tokens and whether they end."""
        if self.has_event_ids:
            self.before, self.num_events = self._now, 0
        for number, (num_tokens, has_ended) in given.items():
            tokens, had_ended = self.places.get(number, (0, False))
            self.places[number] = (tokens + num_tokens, had_ended or has_ended)
            if self.has_event_ids and self.has_several_prompts:
                self.given.setdefault(number, deque()).append(self.places[number])

    def taken(self, count: int) -> None:
        """Note that the server has taken `count` outputs to their end."""
        self.num_taken += count
        self.before, self.num_events = self._now, 0

    def next_event(self, output: int | None = None) -> str | None:
        """The id of the event that comes out now; None when the client has it already.

        Where there are several prompts, `output` is the one that the event tells of, None for their usage and end.
        """
        if self.has_several_prompts and output is not None:
            return self._next_piece(output)
        self.num_events += 1
        if self.has_several_prompts:
            position = Position(before=self._said, places=self._said, num_events=self.num_events)
            is_known = self._is_last_known(position)
        else:
            position = Position(before=self.before, places=self._now, num_events=self.num_events)
            is_known = self._is_known(position)
        return None if is_known else f"{self.base}/{position.text}"

    def _next_piece(self, output: int) -> str | None:
        before = self._said
        piece = self.given[output].popleft()
        if piece <= before[output]:
            return None
        self.said[output] = piece
        return f"{self.base}/{Position(before=before, places=self._said, num_events=1).text}"

    @property
    def _now(self) -> tuple[Place, ...]:
        return tuple(self.places.get(number, (0, False)) for number in range(self.num_outputs))

    @property
    def _said(self) -> tuple[Place, ...]:
        return tuple(self.said.get(number, self.cuts_of(number)[1]) for number in range(self.num_outputs))

    def _is_known(self, position: Position) -> bool:
        had = self.after
        if had is None or len(had.places) != self.num_outputs or len(had.before) != self.num_outputs:
            return False
        if self.num_taken == self.num_outputs:
            return self._is_last_known(position)
        if position.places == had.places and had.before != had.places:
            return position.num_events <= had.num_events
        return all(now <= then for now, then in zip(position.places, had.before, strict=True))

    def _is_last_known(self, position: Position) -> bool:
        """Whether the client has this event behind the last token."""
        had = self.after
        return (
            had is not None
            and had.before == had.places == position.places
            and position.num_events <= had.num_events
        )


def begin(headers: Mapping[str, str], body: Mapping[str, Any], *, caller: str) -> Exchange:
    """The exchange of a request with these headers, whose names are in lower case. InvalidRequest names a bad one.

    A key belongs to its caller: two callers with the same key do not meet.
    """
    key = headers.get("idempotency-key") or None
    if key is not None and len(key) > 256:
        raise InvalidRequest("has more than 256 characters", field="Idempotency-Key")
    scoped = key if key is None or not caller else f"{caller}:{key}"
    half = _half(headers, body)
    is_detached = any((scoped, half, _truth(headers, "x-l4-background"), body.get("background") is True))
    base = uuid.uuid4().hex if scoped is None else request_id_of(scoped)
    exchange = Exchange(
        base=checked_id(headers.get(ID_HEADER)) if half is Half.ANSWER else base,
        half=half,
        idempotency_key=scoped,
        caller=caller,
        priority=_whole(headers, "x-l4-priority"),
        deadline_s=_seconds(headers, "x-l4-deadline-s"),
        traceparent=headers.get("traceparent"),
        is_detached=is_detached,
        has_event_ids=_truth(headers, "x-l4-event-ids") or is_detached or bool(headers.get("last-event-id")),
        has_open_end=not any(body.get(name) is not None for name in _OPEN_ENDS) and "prompt" not in body,
    )
    _go_on(exchange, headers.get("last-event-id"))
    return exchange


def _half(headers: Mapping[str, str], body: Mapping[str, Any]) -> Half | None:
    """The half of the exchange that is wanted; None for all of it."""
    text = headers.get(HALF_HEADER)
    if text is None:
        return None
    if text not in list(Half):
        raise InvalidRequest(f"must be {' or '.join(Half)}", field=_shown(HALF_HEADER))
    for name, idle in (("stream", False), ("background", False), ("n", 1)):
        if body.get(name) not in (None, idle):
            raise InvalidRequest(f"must be {str(idle).lower()} in batches and for half an exchange", field=name)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not all(type(token) is int for token in prompt):
        raise InvalidRequest("must be one prompt in batches and for half an exchange", field="prompt")
    return Half(text)


def _go_on(exchange: Exchange, event_id: str | None) -> None:
    """Take up the stream of which the client has the events up to this one."""
    if not event_id:
        return
    found = _EVENT_ID.fullmatch(event_id)
    if found is None:
        raise InvalidRequest("is no id of an event of this server", field="Last-Event-ID")
    base = found["base"]
    if exchange.idempotency_key is None:
        if not _HEX.fullmatch(base):
            raise InvalidRequest("needs the Idempotency-Key that the request had", field="Last-Event-ID")
        exchange.base = base
    elif base != exchange.base:
        raise InvalidRequest("belongs to another Idempotency-Key", field="Last-Event-ID")
    exchange.after = Position.parse(found["before"], found["places"], found["num"])


def _whole(headers: Mapping[str, str], name: str) -> int | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise InvalidRequest("must be a whole number", field=_shown(name)) from None


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest("must be a number of seconds", field=_shown(name)) from None


def _truth(headers: Mapping[str, str], name: str) -> bool:
    text = headers.get(name, "false").lower()
    if text not in ("0", "1", "false", "true"):
        raise InvalidRequest("must be true or false", field=_shown(name))
    return text in ("1", "true")


def _shown(name: str) -> str:
    return "-".join(part.capitalize() for part in name.split("-"))
