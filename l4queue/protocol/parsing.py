"""Values of the reads, and their tolerant parsing: another release, or a stranger, may have written them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from l4queue.compat import MAX_NUMBER, object_of, value_of
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from l4queue.errors import UnreadableValue
from l4queue.models import RequestState, WorkerLoad
from l4queue.protocol.foreign import each, or_else, text
from l4queue.protocol.records import in_order
from l4queue.value_class import value_class

__all__ = (
    "BODY_FIELDS",
    "DeadLetter",
    "FinishedRequest",
    "InboxBody",
    "StreamEntry",
    "WorkerView",
    "body",
    "body_told",
    "dead_letter",
    "figures",
    "finished_one",
    "ledger_lines",
    "load_from_json",
    "load_to_json",
    "order",
    "parse_entries",
    "plan",
    "planned_ms",
    "published",
    "scored",
    "whole",
    "worker",
)

T = TypeVar("T")

StreamEntry = tuple[bytes, dict[bytes, bytes]]
BODY_FIELDS = ("state", "kind", "prompt", "body", "submitted_ms", "deadline_ms", "open_end")
_KINDS = (b"p", b"m", b"t")


@value_class(kw_only=True)
class InboxBody:
    """A submitted request as a dispatcher reads it.

    Of token ids it may know no more than their number and the greatest of them; then `prompt` is empty.
    """

    state: str
    kind: str
    prompt: bytes
    body: bytes
    submitted_ms: int
    has_open_end: bool = False  # max_tokens was left out
    num_ids: int | None = None
    greatest_id: int = 0
    fault: str = ""  # why it cannot be read; `raw` is what there is
    raw: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker incarnation as Redis knows it."""

    incarnation: str
    worker_id: str
    expires_ms: int
    seen_ms: int
    load: WorkerLoad
    cost: StepCost | None
    price: MovePrice | None


@value_class(kw_only=True)
class FinishedRequest:
    """The facts of one finished request, from the capped stream `finished`. Times are server ms."""

    request_id: str
    state: str
    prompt_tokens: int
    output_tokens: int
    submitted_ms: int
    started_ms: int | None
    first_token_ms: int | None
    finished_ms: int
    stage: str
    worker: str
    cached_tokens: int | None = None  # prompt tokens found in a prefix cache
    blocks: bytes = b""  # keys of the prompt's full blocks, packed (`policy.prefix_blocks`); empty: not told


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A request that kills its worker, or an inbox entry that cannot be read (then with its bytes)."""

    request_id: str
    why: str
    raw: str
    at_ms: int


def parse_entries(reply: Any) -> list[StreamEntry]:
    """Entries of one stream from XRANGE, XREVRANGE or XAUTOCLAIM; deleted ones are left out."""
    return [(row[0], _pairs(row[1])) for row in reply if row is not None and row[1] is not None]


def _pairs(flat: Any) -> dict[bytes, bytes]:
    if isinstance(flat, Mapping):
        return dict(flat)
    parts = iter(flat)
    return dict(zip(parts, parts, strict=True))


def whole(raw: bytes | None) -> int:
    """A count or a time; UnreadableValue where it is no whole number ≥ 0 that a double holds."""
    try:
        number = int(raw or b"")
    except ValueError:
        raise UnreadableValue(f"no whole number: {raw!r:.40}") from None
    if not 0 <= number <= MAX_NUMBER:
        raise UnreadableValue(f"not a number that counts anything: {raw!r:.40}")
    return number


def figures(key: str, reply: Any, *, least: float = -MAX_NUMBER) -> dict[str, str]:
    """The fields of a hash of numbers; others are reported."""

    def one(name: bytes, values: Mapping[bytes, bytes]) -> tuple[str, str]:
        number = values[name].decode()
        if not least <= float(number) <= MAX_NUMBER:
            raise UnreadableValue(f"not a number that counts anything: {number:.40}")
        return name.decode(), number

    return dict(each(key, ((name, {name: value}) for name, value in _pairs(reply).items()), one))


def finished_one(_: bytes, v: Mapping[bytes, bytes]) -> FinishedRequest:
    """One entry of the stream of outcomes. A clock that went back leaves its times in order all the same."""
    times_ms = in_order(
        whole(v[b"a"]), *(whole(v[name]) if v.get(name) else None for name in (b"b", b"f")), whole(v[b"d"])
    )
    return FinishedRequest(
        request_id=v[b"i"].decode(),
        state=v[b"s"].decode(),
        prompt_tokens=whole(v[b"p"]),
        output_tokens=whole(v[b"o"]),
        submitted_ms=times_ms[0] or 0,
        started_ms=times_ms[1],
        first_token_ms=times_ms[2],
        finished_ms=times_ms[3] or 0,
        stage=v.get(b"g", b"").decode(),
        worker=v.get(b"w", b"").decode(),
        cached_tokens=whole(v[b"k"]) if v.get(b"k") else None,
        blocks=v.get(b"h", b""),
    )


def dead_letter(entry_id: bytes, values: Mapping[bytes, bytes]) -> DeadLetter:
    """One dead letter, by any writer."""
    return DeadLetter(
        request_id=text(values.get(b"i", b"?")),
        why=text(values.get(b"why", b"?")),
        raw=values.get(b"bytes", b"").decode("latin-1"),
        at_ms=int(entry_id.partition(b"-")[0]),
    )


def body(row: list[Any]) -> InboxBody | None:
    """The fields of a record that are there. An unreadable one is for its reader to refuse, with its bytes."""
    if row[0] is None:
        return None
    state, kind, prompt, body, submitted_ms, _, open_end = row
    fault, accepted_ms = "", 0
    try:
        accepted_ms = whole(submitted_ms)
        if kind not in _KINDS or prompt is None or body is None:
            raise UnreadableValue(f"kind {kind!r:.40}, prompt and body must be there")
    except (TypeError, ValueError) as error:
        fault = f"its record cannot be read: {error}"
    return InboxBody(
        state=text(state),
        kind=text(kind or b""),
        prompt=prompt or b"",
        body=body or b"{}",
        submitted_ms=accepted_ms,
        has_open_end=open_end is not None,
        fault=fault,
        raw=repr(dict(zip(BODY_FIELDS, row, strict=True))).encode() if fault else b"",
    )


def body_told(values: Mapping[bytes, bytes]) -> InboxBody | None:
    """The same as an inbox entry tells it; None where the record is to be read."""
    kind, prompt, num_ids = values.get(b"k", b""), values.get(b"p"), values.get(b"n")
    if kind not in _KINDS or b"y" not in values or (prompt is None and num_ids is None):
        return None
    try:
        return InboxBody(
            state=RequestState.SUBMITTED,
            kind=kind.decode(),
            prompt=prompt or b"",
            body=values[b"y"],
            submitted_ms=whole(values.get(b"s")),
            has_open_end=values.get(b"o") == b"1",
            num_ids=None if num_ids is None else whole(num_ids),
            greatest_id=0 if num_ids is None else whole(values.get(b"g")),
        )
    except UnreadableValue:
        return None


# readers of the first release fail at unknown names in `load`
_NEW_FIELDS = (
    "is_emptying",
    "can_empty",
    "max_model_len",
    "models",
    "num_prompt_tokens",
    "num_cached_tokens",
    "longest_prefill_tokens",
    "prefill_due_ms",
    "kv_budget_bytes",
    "copies_due_ms",
)


def load_to_json(load: WorkerLoad) -> dict[str, dict[str, Any]]:
    """`load` and `more` of what a worker publishes: all that release 1 knows, and what came after it."""
    told = asdict(load)
    return {"more": {name: told.pop(name) for name in _NEW_FIELDS}, "load": told}


def price_to_json(price: MovePrice) -> dict[str, Any]:
    """`price` of what a worker publishes: all that release 1 knows. The room stands in its load."""
    told = asdict(price)
    del told["room_bytes"]
    return told


def load_from_json(told: Mapping[str, Any]) -> WorkerLoad:
    """The inverse, from any release: what is unknown here is left out, what is missing has its default."""
    more = told.get("more")
    return value_of(WorkerLoad, {**(more if isinstance(more, dict) else {}), **told["load"]}, what="load")


def worker(incarnation: str, expires_ms: int, key: str, row: list[Any]) -> WorkerView | None:
    """Load that a worker of any release published: `more` has the facts that came after release 1."""
    if row[0] is None:
        return None
    told = object_of(row[1], what="load")
    load = load_from_json(told)
    price = _part(key, told.get("price"), _price)  # workers of an older release do not tell
    return WorkerView(
        incarnation=incarnation,
        worker_id=row[0].decode(),
        expires_ms=expires_ms,
        seen_ms=whole(row[2]),
        load=load,
        cost=_part(key, told.get("cost"), _cost),
        price=price and replace(price, room_bytes=load.kv_budget_bytes),
    )


def _part(key: str, data: object, read: Callable[[object], T]) -> T | None:
    return None if data is None else or_else(key, read, lambda: None)(data)


def _cost(data: object) -> StepCost:
    cost = value_of(StepCost, data, what="cost")
    if cost.max_batched_tokens < 1 or cost.max_num_seqs < 1:
        raise UnreadableValue("cost: an engine that runs nothing")
    return cost


def _price(data: object) -> MovePrice:
    price = value_of(MovePrice, data, what="price")
    if price.bandwidth_bytes_per_s is not None and price.bandwidth_bytes_per_s < 1.0:
        raise UnreadableValue("price: a bandwidth that moves nothing")
    return price


def plan(row: list[Any]) -> tuple[int, str | None]:
    """Version and JSON of the plan in force."""
    return (whole(row[0]) if row[0] else 0, text(row[1]) if row[1] else None)


def planned_ms(memory: str | None, *, key: str) -> int | None:
    """When the round of planning ended that wrote this memory; None where nobody can tell."""

    def at_ms(text: str) -> int | None:
        return int(float(object_of(text, what="memory")["at_ms"]))

    return None if memory is None else or_else(key, at_ms, lambda: None)(memory)


def ledger_lines(key: str, raw: bytes | None) -> list[str]:
    """The lines of a ledger: JSON objects, each with `at_ms` and `what`. Others are reported."""

    def line(_: bytes, fields: Mapping[bytes, bytes]) -> str:
        found = object_of(fields[b""], what="line")
        float(found["at_ms"])
        if not isinstance(found["what"], str):
            raise UnreadableValue("`what` is not text")
        return fields[b""].decode()

    return each(key, ((b"line", {b"": one}) for one in (raw or b"").splitlines()), line)


def published(entry_id: bytes, v: Mapping[bytes, bytes]) -> tuple[int, int, str]:
    """When a plan was published, its version and JSON."""
    return (int(entry_id.partition(b"-")[0]), whole(v[b"version"]), v[b"body"].decode())


def order(entry_id: bytes) -> tuple[int, int]:
    """A stream id as what it is ordered by."""
    ms, _, sequence = entry_id.partition(b"-")
    return int(ms), int(sequence)


def scored(reply: Any) -> list[tuple[str, int]]:
    """Members and scores of a sorted set; a score that is no time is the end of all time."""
    pairs = reply
    if reply and not isinstance(reply[0], (list, tuple)):
        pairs = zip(reply[::2], reply[1::2], strict=True)
    return [(text(member), int(max(-MAX_NUMBER, min(MAX_NUMBER, float(score))))) for member, score in pairs]
