"""The client without its I/O: requests to calls, replies to handles, entries to text, outcomes to errors."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from l4queue.client.arguments import checked_text, printable, spec_of
from l4queue.client.tracing import EnqueueTraces
from l4queue.errors import (
    IdempotencyConflict,
    InvalidRequest,
    L4QueueError,
    OutputLost,
    QueueFull,
    RequestCancelled,
    RequestDead,
    RequestExpired,
    RequestFailed,
    RequestTooLong,
    ResultExpired,
    UnknownRequest,
)
from l4queue.models import TERMINAL, RequestBody, RequestSpec, RequestState
from l4queue.policy.retry import retry_after_s
from l4queue.protocol.calls import Call, Calls, SubmitReply, Verdict
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from l4queue.protocol.records import CachedPrompt, Followed, OutputEntry, RequestRecord, TokenLogprobs, pack_ids
from l4queue.sampling import DEFAULT_MAX_TOKENS
from l4queue.strict_json import canonical_json

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from l4queue.client.demux import StatusQuery
    from l4queue.config import Settings
from l4queue.value_class import value_class

__all__ = (
    "Chunk",
    "ClientCore",
    "Prepared",
    "Result",
    "check_kept",
    "check_outcome",
    "known",
    "request_id_of",
    "unknown",
)

_BODY_FIELDS = set(RequestBody.model_fields)
_DIGEST_FIELDS = _BODY_FIELDS - {"traceparent"}  # the same request in another trace is the same request
_MAX_REASON_CHARS = 1000  # of a cancellation, kept in the record and shown whole
_NEWS_TTL_MS = 60_000  # a client that has gone is told nothing after that
_BYTES_PER_TOKEN = 4  # estimate for admission only; the dispatcher counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New output. `offset` tokens exist after it: pass it as `after` to go on from here.

    `text` is that of the tokens after the first `text_after` ones. These are `token_ids`, but for the first chunk
    of a stream whose `after` lies inside what was written at once: its `token_ids` begin at `after`, its text is
    that of the whole, as text cannot be split by tokens. The offset of a chunk never lies inside another.
    `logprobs` has one for each of the tokens, or is None when they were not asked for. `cached` comes with the
    first tokens of an output, from engines that tell by then how much of the prompt was in their prefix cache.
    """

    text: str
    token_ids: tuple[int, ...]
    offset: int
    text_after: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cached: CachedPrompt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The stored outcome of a finished request. Times are by the server's clock, s.

    `logprobs` has one for each token, or is None when they were not asked for. `cached_tokens` of the prompt were
    in the engine's prefix cache; None: the engine does not tell.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    resumed: bool
    stage: str
    worker: str
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    metadata: dict[str, JsonValue] | None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cached_tokens: int | None = None


@value_class(kw_only=True)
class Prepared:
    """A validated request with its id, the call that submits it, and the span that ends when it is accepted."""

    request_id: str
    call: Call[SubmitReply]
    charge_tokens: int
    span: Span | None = None
    has_key: bool = False


class ClientCore:
    """Builds calls and reads replies for one client. Does no I/O."""

    def __init__(self, settings: Settings) -> None:
        RequestSpec.model_rebuild()  # once in a process, before threads enqueue
        self.settings = settings
        self.keys = Keys(settings.namespace)
        self.calls = Calls(self.keys)
        self.reads = Reads(self.keys)
        self.client_id = uuid.uuid4().hex
        self._traces = EnqueueTraces(settings)

    def prepare(self, spec: RequestSpec, *, request_id: str | None = None) -> Prepared:
        """Id, digest and submit call of a request. While an idempotency key is known, it gives the same id.

        A `request_id` of the caller's own does as long as the request has a record.

        The digest is that of the earlier release, which did not write a `max_tokens` of 256: a request that is
        enqueued again after an upgrade is the same.
        """
        try:
            kind, prompt = _encode_prompt(spec)
            greatest_id = None if spec.token_ids is None else max(spec.token_ids)
            body = spec.model_dump_json(include=_DIGEST_FIELDS, exclude_defaults=True)
        except ValueError as error:  # changed behind its checks: by model_copy, or in a dictionary that it holds
            raise InvalidRequest(f"is not what was checked: {error}", field="request") from None
        digest = canonical = ""
        key_ttl_ms: int | None = None
        has_own_id = request_id is not None
        request_id = request_id or uuid.uuid4().hex
        if spec.idempotency_key is not None:
            key_ttl_ms = int(self.settings.idempotency_ttl_s * 1000)
            request_id = request_id_of(spec.idempotency_key)
        if spec.idempotency_key is not None or has_own_id:
            digested = _digested(spec, body)
            digest = _digest(kind, digested, prompt)
            if spec.metadata or spec.params.structured_outputs is not None:  # their keys have no order
                canonical = _digest(kind, canonical_json(json.loads(digested)), prompt)
        traceparent, span = self._traces.begin(spec)
        if traceparent is not None:
            traced = spec.model_copy(update={"traceparent": traceparent})
            body = traced.model_dump_json(include=_BODY_FIELDS, exclude_defaults=True)
        charge_tokens = len(prompt) // _BYTES_PER_TOKEN + 1 + (spec.params.max_tokens or DEFAULT_MAX_TOKENS)
        call = self.calls.submit(
            request_id,
            digest=digest,
            body=body,
            kind=kind,
            prompt=prompt,
            charge_tokens=charge_tokens,
            max_live_tokens=self.settings.max_backlog_tokens,
            max_live_bytes=self.settings.max_backlog_bytes,
            deadline_ms=ceil(spec.deadline_s * 1000) if spec.deadline_s else 0,  # 0 is none
            ttl_ms=int(self.settings.result_ttl_s * 1000),
            client_id=self.client_id,
            canonical=canonical,
            key_ttl_ms=key_ttl_ms,
            has_open_end=spec.params.max_tokens is None,
            greatest_id=greatest_id,
        )
        return Prepared(
            request_id=request_id, call=call, charge_tokens=charge_tokens, span=span, has_key=bool(digest)
        )

    def prepare_many(self, requests: Iterable[Any], common: Mapping[str, Any]) -> Iterator[Prepared]:
        """The same for the elements of `enqueue_many`, in order; InvalidRequest tells which one is wrong."""
        if isinstance(requests, str | bytes | Mapping | RequestSpec):  # would be its characters, or its names
            raise InvalidRequest("must be several, such as a list; `enqueue` takes one", field="requests")
        for position, request in enumerate(requests):
            try:
                yield self.prepare(spec_of(request, common))
            except InvalidRequest as error:
                found = InvalidRequest(f"{error.args[0]} (in requests[{position}])", field=error.field)
                found.refused = (position,)
                raise found from None

    def accepted(self, prepared: Prepared, reply: SubmitReply) -> str:
        """The id of the accepted request, or of the one that its key stands for.

        QueueFull or IdempotencyConflict otherwise.
        """
        request_id = reply.request_id or prepared.request_id
        if reply.verdict is Verdict.FULL:
            wait_s = retry_after_s(reply.live_tokens, drain_tokens_per_s=reply.drain_tokens_per_s)
            raise QueueFull(self._why_full(prepared, reply.live_tokens), retry_after_s=wait_s)
        if reply.verdict is Verdict.CONFLICT:
            raise IdempotencyConflict(
                f"the idempotency key of request {request_id} was used with a different body"
            )
        if prepared.span is not None:
            self._traces.end(prepared.span, request_id=request_id, is_new=reply.verdict is Verdict.OK)
        return request_id

    def _why_full(self, prepared: Prepared, live_tokens: int) -> str:
        most_tokens = self.settings.max_backlog_tokens
        if live_tokens + prepared.charge_tokens > most_tokens:
            told = f"{live_tokens} tokens wait or run, and this request would exceed the {most_tokens}"
            return f"the backlog is full: {told} of L4_MAX_BACKLOG_TOKENS"
        most_bytes = self.settings.max_backlog_bytes
        return f"the backlog is full: its requests take the {most_bytes} bytes of L4_MAX_BACKLOG_BYTES"

    @staticmethod
    def has_mail(prepared: Prepared, reply: SubmitReply) -> bool:
        """Whether this client's mailbox tells of the end. With a key another client may have been first."""
        return reply.verdict is Verdict.OK or not prepared.has_key

    def cancel(self, request_id: str, *, reason: str) -> Call[tuple[Verdict, str | None]]:
        """The call that ends a request; InvalidRequest for a reason that cannot be kept.

        Its repeat after a lost reply is answered like the first.
        """
        text = checked_text(reason, field="reason", most_chars=_MAX_REASON_CHARS)
        return self.calls.cancel(request_id, reason=text, nonce=uuid.uuid4().hex)

    @staticmethod
    def ping() -> Call[None]:
        """The call that asks for nothing but an answer."""
        return Call(None, (), ("PING",), lambda _: None)

    def output(
        self, request_id: str, *, after: int = 0
    ) -> tuple[Call[RequestRecord | None], Call[list[OutputEntry]]]:
        """The record and the output beyond `after` tokens, to be read in this order."""
        return self.reads.record(request_id), self.reads.output(request_id, after=after)

    def ended(self, request_id: str) -> Call[tuple[RequestRecord | None, list[OutputEntry]]]:
        """Both of a request that ended well a moment ago; no record where its output does not tell it."""
        return self.reads.ended(request_id)

    def follow(self, query: StatusQuery) -> Call[Followed]:
        """The call that asks where requests are, and has this client told of the followed ones."""
        return self.calls.follow(
            self.client_id, followed=query.followed, looked_at=query.looked_at, ttl_ms=_NEWS_TTL_MS
        )

    def unfollow(self, request_id: str) -> Call[Verdict]:
        """The call after which this client is told of the request no more."""
        return self.calls.unfollow(request_id, client_id=self.client_id)

    def trim_news(self, last_id: str) -> Call[int]:
        """The call that drops news up to this entry, which have been read."""
        return Call(None, (), ("XTRIM", self.keys.news(self.client_id), "MINID", "~", last_id), int)

    def result(self, record: RequestRecord, entries: Sequence[OutputEntry]) -> Result:
        """The result of a done request from all its output; the matching error for any other outcome."""
        check_outcome(record)
        if record.offset and not entries:
            check_kept(record)
        texts: list[str] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for entry in entries:
            texts.append(entry.text)
            token_ids.extend(entry.token_ids)
            logprobs.extend(entry.logprobs or ())
        if len(token_ids) != record.offset:
            told = f"request {record.request_id} has {record.offset} tokens by its record"
            raise OutputLost(f"{told}, but {len(token_ids)} are stored")
        body = record.body_fields
        tpot_ms, ttft_ms = record.tpot_ms, record.ttft_ms
        return Result(
            request_id=record.request_id,
            text="".join(texts),
            token_ids=tuple(token_ids),
            finish_reason=record.finish_reason or "",
            prompt_tokens=record.prompt_tokens or 0,
            output_tokens=len(token_ids),
            resumed=record.was_resumed,
            stage=record.stage or "",
            worker=record.worker or "",
            ttft_s=None if ttft_ms is None else ttft_ms / 1000,
            tpot_s=None if tpot_ms is None else tpot_ms / 1000,
            e2e_s=(record.e2e_ms or 0) / 1000,
            metadata=body.get("metadata"),
            logprobs=tuple(logprobs) if "logprobs" in (body.get("params") or {}) else None,
            cached_tokens=record.cached_tokens,
        )


def check_kept(record: RequestRecord) -> None:
    """Raise ResultExpired for a request that has ended: the caller has found no end in its output."""
    if record.state in TERMINAL:
        why = "has expired" if record.dropped_ms is None else "was dropped early: L4_MAX_RESULT_BYTES was reached"
        raise ResultExpired(
            f"request {record.request_id} is {record.state.value}; its output of {record.offset} tokens {why}"
        )


def check_outcome(record: RequestRecord) -> None:
    """Raise the error that a terminal state other than done stands for."""
    if record.state is RequestState.DONE:
        return
    if record.state not in TERMINAL:
        told = f"request {record.request_id} had ended and is {record.state.value} again"
        raise OutputLost(f"{told}: a server lost its outcome; read it again")
    kinds: Mapping[RequestState, type[L4QueueError]] = {
        RequestState.CANCELLED: RequestCancelled,
        RequestState.EXPIRED: RequestExpired,
        RequestState.DEAD: RequestDead,
    }
    message = f"request {record.request_id} {record.state.value}"
    if record.error:
        message += f": {record.field}: {record.error}" if record.field else f": {record.error}"
    if record.state is RequestState.FAILED:
        kind = RequestTooLong if record.finish_reason == "too_long" else RequestFailed
        raise kind(message, request_id=record.request_id, field=record.field)
    raise kinds[record.state](message, request_id=record.request_id)  # type: ignore[call-arg]


def known(request_id: str, record: RequestRecord | None) -> RequestRecord:
    """The record, or UnknownRequest."""
    if record is None:
        raise unknown(request_id)
    return record


def request_id_of(idempotency_key: str) -> str:
    """The id of the one request that a key stands for."""
    return "k" + hashlib.sha256(idempotency_key.encode()).hexdigest()[:31]


def _digested(spec: RequestSpec, body: str) -> str:
    if spec.params.max_tokens != DEFAULT_MAX_TOKENS:
        return body
    plain = spec.model_copy(update={"params": spec.params.model_copy(update={"max_tokens": None})})
    return plain.model_dump_json(include=_DIGEST_FIELDS, exclude_defaults=True)


def _digest(kind: str, body: str, prompt: bytes) -> str:
    return hashlib.sha256(f"{kind}\0{body}\0".encode() + prompt).hexdigest()


def unknown(request_id: str) -> UnknownRequest:
    """The error for a request without a record."""
    why = "never accepted, or its result has expired or was dropped for want of room"
    return UnknownRequest(f"no request {printable(request_id)}: {why}")


def _encode_prompt(spec: RequestSpec) -> tuple[str, bytes]:
    if spec.prompt is not None:
        return "p", spec.prompt.encode()
    if spec.token_ids is not None:
        return "t", pack_ids(spec.token_ids)
    messages = [message.model_dump() for message in spec.messages or ()]
    return "m", json.dumps(messages, ensure_ascii=False).encode()
