"""Calls of the scripts as values: script, keys, arguments, and the parser of the reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from l4queue.models import UNBOUNDED_TOKENS
from l4queue.policy.admission import AdmissionBudget
from l4queue.policy.prefix_affinity import OwnChoice
from l4queue.policy.prefix_blocks import BLOCK_TOKENS, KEY_BYTES
from l4queue.protocol.keys import Keys
from l4queue.protocol.ledger import LedgerEvent
from l4queue.protocol.readiness import Readiness
from l4queue.protocol.records import (
    NO_QUOTA,
    BackgroundQuota,
    CachedPrompt,
    Followed,
    Outcome,
    TokenLogprobs,
    pack_ids,
    pack_logprobs,
)
from l4queue.protocol.replies import (
    Migrated,
    Reaped,
    SubmitReply,
    Taken,
    Verdict,
    parse_cancelled,
    parse_migrated,
    parse_reaped,
    parse_submitted,
    parse_taken,
    parse_verdict,
)
from l4queue.protocol.sizes import waiting_bytes
from l4queue.value_class import value_class

__all__ = (
    "Arg",
    "Call",
    "Calls",
    "Migrated",
    "Move",
    "MoveKind",
    "Reaped",
    "SubmitReply",
    "Taken",
    "Taker",
    "Verdict",
)

T = TypeVar("T")
Arg = str | int | float | bytes

MAX_DEAD_LETTER_BYTES = 16_384
"""How much of an undecodable entry is kept. With 10,000 dead letters at most this bounds their memory."""


@value_class(kw_only=False)
class Call(Generic[T]):
    """One round trip: a script when `script` is set, else the plain command in `args`.

    Every call is safe to repeat after a lost reply; that is what lets the executors retry.
    """

    script: str | None
    keys: tuple[str, ...]
    args: tuple[Arg, ...]
    parse: Callable[[Any], T]


class MoveKind(StrEnum):
    """Why a running request is moved on purpose."""

    HANDOVER = LedgerEvent.HANDOVER.value  # it has outgrown its stage
    ESCAPE = LedgerEvent.ESCAPE.value  # a prefill would have held it up
    STEAL = LedgerEvent.STEAL.value  # a sibling with room asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A move as the ledger has it: kind, predicted benefit and cost, and the ticket of its KV cache."""

    kind: MoveKind
    benefit_ms: float
    cost_ms: float
    kv: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taker:
    """A worker that takes: under this incarnation, for its own stage."""

    worker_id: str
    incarnation: str
    stage: str


def _told(cached: CachedPrompt | None, *more: bytes, logprobs: Sequence[TokenLogprobs]) -> tuple[str | bytes, ...]:
    """The last arguments of a write; no logprobs where none were asked for, which is nearly always."""
    found = "" if cached is None else cached.pack()
    return (found, *more, pack_logprobs(logprobs)) if logprobs else (found, *more)


class Calls:
    """Builders of all transitions under one namespace. Pure: nothing here does I/O."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def submit(
        self,
        request_id: str,
        *,
        digest: str,
        body: str,
        kind: str,
        prompt: bytes,
        charge_tokens: int,
        max_live_tokens: int,
        max_live_bytes: int,
        deadline_ms: int,
        ttl_ms: int,
        client_id: str,
        canonical: str = "",
        key_ttl_ms: int | None = None,
        has_open_end: bool = False,
        greatest_id: int | None = None,
    ) -> Call[SubmitReply]:
        """Accept a request. `charge_tokens` is an estimate until the dispatcher has counted.

        `canonical` is a second digest, of the same request whatever the order of its keys. `key_ttl_ms` says that
        `request_id` was made of an idempotency key, and how long the key is known after the end. With
        `has_open_end` the dispatcher decides `max_tokens`: what still fits. `greatest_id` is that of a `prompt` of
        token ids: with it no dispatcher reads them.
        """
        k = self.keys
        args = (request_id, digest, body, kind, prompt, charge_tokens, waiting_bytes(body, prompt))
        known_ms = "" if key_ttl_ms is None else key_ttl_ms
        limits = (max_live_tokens, max_live_bytes, deadline_ms, ttl_ms, client_id)
        more = (canonical, known_ms, int(has_open_end), "" if greatest_id is None else greatest_id)
        return Call("submit", (k.counts, k.inbox, k.request(request_id)), args + limits + more, parse_submitted)

    def route(
        self,
        request_id: str,
        *,
        entry_id: str,
        stage: str,
        score: float,
        token_ids: Sequence[int],
        max_tokens: int,
        plan_version: int,
        bucket: int,
        why: str = "",
        charge_tokens: int | None = None,
        body: str = "",
        blocks: Sequence[bytes] = (),
        num_stored: int = 0,
        plan_seen: int | None = None,
    ) -> Call[Verdict]:
        """Queue a counted request in its stage and clear its inbox entry. `why` (JSON) is for `explain`.

        A request that was submitted with token ids keeps them: then `num_stored` is their number, and `token_ids`
        is empty. `charge_tokens` None is prompt and `max_tokens`. `body` replaces the one submitted, unless it is
        empty. `blocks` are the keys of the prompt's blocks, where it is to be noted how much of it workers hold.
        STALE, and nothing is done, where another version than `plan_seen` is in force.
        """
        k = self.keys
        num_tokens = num_stored or len(token_ids)
        queued = (request_id, entry_id, stage, repr(score), num_tokens, max_tokens, pack_ids(token_ids))
        charge = "" if charge_tokens is None else charge_tokens
        more = (b"".join(blocks), KEY_BYTES, BLOCK_TOKENS, "" if plan_seen is None else plan_seen)
        args = (*queued, plan_version, bucket, why, charge, body, *more)
        return Call("route", (k.inbox, k.request(request_id), k.hist), args, parse_verdict)

    def refuse(
        self,
        request_id: str,
        *,
        entry_id: str,
        error: str,
        field: str = "",
        reason: str = "invalid",
        raw: bytes = b"",
    ) -> Call[Verdict]:
        """End a request that can never run; the head of `raw` goes to the dead letters with it."""
        k = self.keys
        keys = (k.inbox, k.request(request_id), k.dead)
        kept = raw[:MAX_DEAD_LETTER_BYTES]
        return Call("refuse", keys, (request_id, entry_id, error, field, kept, reason), parse_verdict)

    def take(
        self,
        stage: str,
        *,
        taker: Taker,
        nonce: str,
        budget: AdmissionBudget,
        hold: BackgroundQuota = NO_QUOTA,
        num_sharers: int = 1,
        benefit_ms: float = 0.0,
        cost_ms: float = 0.0,
        named: Sequence[OwnChoice] = (),
        readiness: Readiness | None = None,
    ) -> Call[Taken]:
        """Lease waiting requests of a queue while they fit the budget.

        The rule is that of `l4queue.policy.admission.admit`. Of several sharers each takes half its share of each
        class at a time. Requests of another stage than the taker's count as stolen, for the predicted benefit and
        cost. By choice `named` ones are taken, in this order, instead of those at the head; only what they would
        have to compute counts as prefill. With `readiness` the next arrival may wake the taker.
        """
        k = self.keys
        keys = (k.queue(stage), k.worker(taker.incarnation), k.held(taker.incarnation), k.workers)
        room = (budget.num_requests, min(budget.kv_tokens, UNBOUNDED_TOKENS), budget.growth_tokens)
        first = (taker.incarnation, nonce, *room, taker.worker_id, stage)
        sharing = (budget.prefill_tokens, int(budget.is_idle), num_sharers)
        price = (taker.stage, f"{benefit_ms:.3f}", f"{cost_ms:.3f}")
        held = (round(hold.for_ms), hold.max_requests, hold.longest_tokens, round(hold.overdue_ms))
        names = tuple(part for one in named for part in (one.request_id, one.held_tokens, one.reason))
        wait = ("", "", "", 0, int(bool(named))) if readiness is None else readiness.args()
        return Call(
            "take", keys, (*first, *sharing, *price, budget.longest_tokens, *held, *wait, *names), parse_taken
        )

    def emit(
        self,
        request_id: str,
        *,
        incarnation: str,
        epoch: int,
        offset: int,
        token_ids: Sequence[int],
        text: str,
        logprobs: Sequence[TokenLogprobs] = (),
        cached: CachedPrompt | None = None,
    ) -> Call[Verdict]:
        """Append tokens that follow the first `offset` ones, with one of `logprobs` each if there are any.

        `cached` is kept with the first tokens alone.
        """
        k = self.keys
        written = (incarnation, epoch, offset, len(token_ids), pack_ids(token_ids), text)
        args: tuple[Arg, ...] = (*written, *_told(cached, logprobs=logprobs))
        return Call("emit", (k.request(request_id), k.output(request_id)), args, parse_verdict)

    def settle(
        self,
        request_id: str,
        *,
        incarnation: str,
        epoch: int,
        offset: int,
        token_ids: Sequence[int],
        text: str,
        outcome: Outcome,
        logprobs: Sequence[TokenLogprobs] = (),
        cached: CachedPrompt | None = None,
        blocks: Sequence[bytes] = (),
    ) -> Call[Verdict]:
        """Write the outcome, last tokens and held back text; tell the `blocks` of the prompt, if any are given."""
        k = self.keys
        last = (offset, len(token_ids), pack_ids(token_ids), text)
        end = (outcome.held_text, outcome.state.value, outcome.finish_reason, outcome.error, outcome.field)
        told = _told(cached, b"".join(blocks), logprobs=logprobs)
        args: tuple[Arg, ...] = (request_id, incarnation, epoch, *last, *end, *told)
        return Call("settle", (k.request(request_id), k.output(request_id)), args, parse_verdict)

    def release(
        self,
        request_id: str,
        *,
        incarnation: str,
        epoch: int,
        stage: str = "",
        score: float | None = None,
        blame: bool = False,
        max_crashes: int = 3,
        move: Move | None = None,
    ) -> Call[Verdict]:
        """Give a running request back with its progress; empty stage and no score keep what it had.

        `blame` counts a crash; one that was run alone for the `max_crashes`-th time is dead.
        """
        order = "" if score is None else repr(score)
        args = (request_id, incarnation, epoch, stage, order, int(blame), max_crashes)
        told = ("", "0", "0", "")
        if move is not None:
            told = (move.kind.value, f"{move.benefit_ms:.3f}", f"{move.cost_ms:.3f}", move.kv)
        return Call("release", (self.keys.request(request_id),), args + told, parse_verdict)

    def ask(self, incarnation: str, *, message: str) -> Call[Verdict]:
        """Send a live worker a message (JSON); LOST when there is no such worker. A repeat is a second message."""
        keys = (self.keys.workers, self.keys.control(incarnation))
        return Call("ask", keys, (incarnation, message), parse_verdict)

    def renew(
        self,
        incarnation: str,
        *,
        worker_id: str,
        lease_ms: int,
        load: str,
        sequence: int,
        register: bool = False,
        histogram: Mapping[str, int] | None = None,
        backlog_ms: float | None = None,
        brief: str = "",
    ) -> Call[Verdict]:
        """Renew (or begin) a lease, publish load and histograms. Without `backlog_ms` no arrival wakes it."""
        k = self.keys
        pairs = tuple(part for item in (histogram or {}).items() for part in item)
        backlog = "" if backlog_ms is None else f"{backlog_ms:.3f}"
        args = (incarnation, lease_ms, worker_id, load, int(register), sequence, backlog, brief, *pairs)
        return Call("renew", (k.workers, k.worker(incarnation), k.hist), args, parse_verdict)

    def ring(self, stage: str, *, incarnations: Sequence[str] = ()) -> Call[Verdict]:
        """Wake these workers, or else the lightest that is ready, if anything waits in the queue of a stage."""
        return Call("ring", (self.keys.queue(stage),), (stage, *incarnations), parse_verdict)

    def extend(self, incarnation: str, *, lease_ms: int) -> Call[Verdict]:
        """Renew a lease without news; LOST when it was reaped."""
        keys = (self.keys.workers, self.keys.worker(incarnation))
        return Call("extend", keys, (incarnation, lease_ms), parse_verdict)

    def pardon(self, incarnation: str, *, worker_id: str, guilty: Iterable[str] = ()) -> Call[Verdict]:
        """Take back what was blamed on requests when this incarnation was reaped, but for the guilty ones."""
        return Call("pardon", (self.keys.lost(incarnation),), (worker_id, *guilty), parse_verdict)

    def retire(self, incarnation: str) -> Call[Verdict]:
        """Leave for good; what is still held goes back without blame."""
        return Call("retire", (self.keys.workers,), (incarnation,), parse_verdict)

    def reap(self, *, limit: int, gap_ms: int, grace_ms: int, max_crashes: int) -> Call[Reaped]:
        """Return the requests of workers whose lease ran out."""
        k = self.keys
        return Call("reap", (k.workers, k.tick), (limit, gap_ms, grace_ms, max_crashes), parse_reaped)

    def cancel(self, request_id: str, *, reason: str, nonce: str = "") -> Call[tuple[Verdict, str | None]]:
        """End a live request. IS comes with the terminal state that it has already.

        A repeat under the same nonce is answered like the first; without one it says IS.
        """
        return Call("cancel", (self.keys.request(request_id),), (request_id, reason, nonce), parse_cancelled)

    def follow(
        self, client_id: str, *, followed: Sequence[str], looked_at: Sequence[str] = (), ttl_ms: int
    ) -> Call[Followed]:
        """Have a client told of all that is written to live requests from now on, and see where requests are.

        Its news stream goes `ttl_ms` after the last call that follows something.
        """
        args: tuple[Arg, ...] = (client_id, ttl_ms, len(followed), *followed, *looked_at)
        return Call("follow", (self.keys.news(client_id),), args, Followed.parse)

    def unfollow(self, request_id: str, *, client_id: str) -> Call[Verdict]:
        """Have a client told of this request no more."""
        return Call("unfollow", (self.keys.request(request_id),), (client_id,), parse_verdict)

    def expire(self, *, limit: int) -> Call[int]:
        """End live requests whose deadline has passed."""
        return Call("expire", (self.keys.deadlines,), (limit,), int)

    def publish(self, *, expected_version: int, version: int, body: str) -> Call[Verdict]:
        """Publish a plan if `expected_version` is still the current one."""
        k = self.keys
        return Call("publish", (k.plan, k.plans), (expected_version, version, body), parse_verdict)

    def remember(self, text: str) -> Call[None]:
        """Store what the planner wants to know in its next round."""
        return Call(None, (), ("SET", self.keys.memory, text), lambda _: None)

    def log_decision(self, text: str) -> Call[None]:
        """Append to the planner's decision log, which keeps the latest 2,000."""
        args = ("XADD", self.keys.decisions, "MAXLEN", "~", 2000, "*", "d", text)
        return Call(None, (), args, lambda _: None)

    def migrate(self, *, source: str, highs: Sequence[int], limit: int, skip: int = 0) -> Call[Migrated]:
        """Move waiting requests of a queue to the stages of their lengths.

        `highs` are the upper ends of all stages but the last. Looks at `limit` requests after the first `skip`
        ones, in serving order.
        """
        return Call("migrate", (self.keys.queue(source),), (source, skip, limit, *highs), parse_migrated)

    def repair(self, request_id: str, *, forgotten_ms: int) -> Call[str]:
        """Mend a live record that has neither inbox entry, queue entry nor lease; says what was missing."""
        k = self.keys
        keys = (k.request(request_id), k.inbox, k.workers)
        return Call("repair", keys, (request_id, forgotten_ms), bytes.decode)

    def forget(self, *, idle_ms: int) -> Call[int]:
        """Remove dispatchers from the inbox group that died long ago with nothing pending."""
        return Call("forget", (self.keys.inbox,), (idle_ms,), int)
