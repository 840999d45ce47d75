"""One running request: from a lease to an engine request, from engine output to writes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b

from l4queue.errors import UnreadableValue
from l4queue.models import RequestBody, RequestState, SamplingParams
from l4queue.protocol.keys import SOLO_STAGE
from l4queue.protocol.records import CachedPrompt, Grant, Outcome, OutputEntry, TokenLogprobs, id_array
from l4queue.sampling import DEFAULT_MAX_TOKENS
from l4queue.value_class import value_class
from workers.engine.base import EngineOutput, EngineRequest, FinishReason
from workers.loop.text import TextStream
from workers.telemetry.observer import PREVIEW_CHARS, RequestView

__all__ = ("Session", "TextFactory", "Write", "engine_id", "resumed_seed")

TextFactory = Callable[[SamplingParams], TextStream]
"""Makes the text of one output: with the model's tokenizer and the request's stop strings."""


@value_class(kw_only=True)
class Write:
    """Output to be written for a session: tokens from `offset` on, and the outcome when it has ended.

    `cached` is told once, by the lease that began the request.
    """

    session: Session
    offset: int
    token_ids: tuple[int, ...]
    text: str
    outcome: Outcome | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached: CachedPrompt | None = None


def engine_id(grant: Grant) -> str:
    """The id in the engine: one per lease, so that output of an aborted lease cannot be mistaken."""
    return f"{grant.request_id}:{grant.epoch}"


def resumed_seed(seed: int, num_resumed: int) -> int:
    """The seed with which a request goes on after `num_resumed` tokens, in [0, 2^63).

    An engine seeds its generator where a request enters it. The same seed again would repeat the random numbers of
    the first tokens for the next ones. This one repeats none, and the same cut gives the same tokens.
    """
    digest = blake2b(f"{seed}:{num_resumed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Session:
    """A leased request and what it has generated. Pure: it never talks to Redis or to the engine.

    `committed` tokens are in the output stream; `pending` ones wait to be written. A pinned request
    commits nothing before its end, so that a restart may generate something else.
    """

    def __init__(
        self,
        grant: Grant,
        *,
        incarnation: str,
        stage: int,
        range_text: str,
        started_s: float,
        make_text: TextFactory,
    ) -> None:
        body = RequestBody.stored(grant.body)
        self.grant = grant
        self.engine_id = engine_id(grant)
        self.incarnation = incarnation
        self.stage = stage
        self.started_s = started_s
        self.range_text = range_text
        self.priority = body.priority
        self.is_traced = body.traceparent is not None
        self.came_from = grant.came_from
        self._found_tokens = 0
        self._is_moving = False
        self._watch_tokens: int | None = None
        self.params: SamplingParams = body.params
        self.max_tokens = body.params.max_tokens or DEFAULT_MAX_TOKENS
        self.prompt_ids = id_array(grant.packed_ids)
        self.output_ids: list[int] = []
        self.committed = 0
        self._text = make_text(body.params)
        self._text.prime(self.prompt_ids)
        self._pending_text: list[str] = []
        self._pending_logprobs: list[TokenLogprobs] = []
        self._pending_cached: CachedPrompt | None = None
        self._outcome: Outcome | None = None
        self.ended_by_text = False
        self.text_preview = ""

    @property
    def request_id(self) -> str:
        return self.grant.request_id

    @cached_property
    def view(self) -> RequestView:
        """The session as a dashboard may show it."""
        grant = self.grant
        return RequestView(
            request_id=grant.request_id,
            stage=self.stage,
            range_text=self.range_text,
            prompt_tokens=grant.prompt_tokens,
            max_tokens=self.max_tokens,
            num_resumed=grant.offset,
            epoch=grant.epoch,
            submitted_ms=grant.submitted_ms,
            is_traced=self.is_traced,
        )

    @property
    def token_ids(self) -> Sequence[int]:
        """Prompt and generated. Not to be changed: of a long prompt a copy costs more than all else here."""
        return self.prompt_ids + array("I", self.output_ids) if self.output_ids else self.prompt_ids

    @property
    def length_tokens(self) -> int:
        """Current length: prompt and generated."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def prefill_tokens(self) -> int:
        """Tokens that its prefill here has to compute: the last one always."""
        return max(1, self.length_tokens - self._found_tokens)

    @property
    def found_tokens(self) -> int:
        """Leading tokens that the engine was believed to hold when it took it."""
        return self._found_tokens

    def expect_found(self, tokens: int) -> None:
        """Believe the engine to hold these leading tokens of it."""
        self._found_tokens = tokens

    @property
    def remaining_tokens(self) -> int:
        """Most tokens that may still be generated."""
        return self.max_tokens - len(self.output_ids)

    @property
    def is_moving(self) -> bool:
        """Whether it is about to leave."""
        return self._is_moving

    @property
    def watch_tokens(self) -> int | None:
        """Length at which a move of it is considered; None: at none."""
        return self._watch_tokens

    def begin_move(self) -> None:
        """Mark it as leaving."""
        self._is_moving = True

    def end_move(self) -> None:
        """Mark it as staying."""
        self._is_moving = False

    def watch_from(self, tokens: int | None) -> None:
        """Consider a move of it from this length on."""
        self._watch_tokens = tokens

    @property
    def may_move(self) -> bool:
        """Whether it may go on elsewhere. Before its first token here it would only be prefilled twice.

        One that runs alone stays: it would wait to be run alone again.
        """
        is_alone = self.grant.stage == SOLO_STAGE
        is_free = not (self._is_moving or self.has_ended or self.params.is_pinned or is_alone)
        return is_free and len(self.output_ids) > self.grant.offset

    @property
    def has_ended(self) -> bool:
        return self._outcome is not None

    @property
    def awaits_first_token(self) -> bool:
        """Whether its prompt is still to be prefilled here."""
        return len(self.output_ids) == self.grant.offset and not self.has_ended

    @property
    def is_urgent(self) -> bool:
        """Whether the next write should not wait for more: the first tokens here, or the end."""
        are_first = self.committed == self.grant.offset < len(self.output_ids)
        return self.has_ended or (are_first and not self.params.is_pinned)

    def resume(self, entries: Sequence[OutputEntry], *, eos_token_ids: frozenset[int]) -> None:
        """Go on from what earlier workers committed. They may have died after the very last token.

        As in vLLM, the token that ends the output gives no text, whether or not the tokenizer calls it special.
        UnreadableValue where that is not all that the record says there is.
        """
        if not self.params.ignore_eos:
            self._text.silence(eos_token_ids)
        ids = [token for entry in entries for token in entry.token_ids]
        if len(ids) != self.grant.offset:
            raise UnreadableValue(f"its output has {len(ids)} tokens, its record says {self.grant.offset}")
        if not ids:
            return
        self.output_ids = ids
        self.committed = len(ids)
        stopped = self._text.replay(ids)
        if stopped or (self._is_stop_token(ids[-1], eos_token_ids) and len(ids) >= self.params.min_tokens):
            self._end(FinishReason.STOP)
        elif self.remaining_tokens <= 0:
            self._end(FinishReason.LENGTH)

    def engine_request(self) -> EngineRequest:
        """The engine's request: the rest of the output. In its class, a request that has run before goes first."""
        params, num_resumed = self.params, len(self.output_ids)
        if params.seed is not None and num_resumed:
            params = params.model_copy(update={"seed": resumed_seed(params.seed, num_resumed)})
        return EngineRequest(
            request_id=self.engine_id,
            token_ids=self.token_ids,
            max_tokens=self.remaining_tokens,
            min_tokens=max(0, self.params.min_tokens - num_resumed),
            params=params,
            priority=2 * self.priority + (num_resumed == 0),
            num_resumed=num_resumed,
            kv=self.grant.kv,
        )

    def feed(self, output: EngineOutput) -> None:
        """Take in new tokens; may end the session (a stop string needs no consent of the engine)."""
        if self.has_ended:
            return
        if output.finish_reason is FinishReason.ERROR:
            error, field = output.error or "", output.field
            self._outcome = Outcome(state=RequestState.FAILED, finish_reason="error", error=error, field=field)
            return
        if output.cached is not None and not self.grant.offset:
            self._pending_cached = output.cached
        if output.token_ids:
            piece = self._text.feed(output.token_ids)
            self.output_ids.extend(output.token_ids[: piece.num_tokens])
            self._pending_text.append(piece.text)
            if output.logprobs:
                self._pending_logprobs.extend(output.logprobs[: piece.num_tokens])
            if len(self.text_preview) < PREVIEW_CHARS:
                self.text_preview = (self.text_preview + piece.text)[:PREVIEW_CHARS]
            if piece.stopped:
                self.ended_by_text = True
                self._end(FinishReason.STOP)
                return
        if output.finish_reason is not None:
            self._end(output.finish_reason)

    def take_write(self) -> Write | None:
        """Output to write now, or None. It counts as committed from here on."""
        new = tuple(self.output_ids[self.committed :])
        if self._outcome is None and (not new or self.params.is_pinned):
            return None
        text, self._pending_text = "".join(self._pending_text), []
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self._pending_logprobs:
            logprobs, self._pending_logprobs = tuple(self._pending_logprobs), []
        cached, self._pending_cached = self._pending_cached, None
        offset, self.committed = self.committed, len(self.output_ids)
        return Write(
            session=self,
            offset=offset,
            token_ids=new,
            text=text,
            outcome=self._outcome,
            logprobs=logprobs,
            cached=cached,
        )

    def _end(self, reason: FinishReason) -> None:
        held = "" if self._text.stopped else self._text.flush()
        self._outcome = Outcome(state=RequestState.DONE, finish_reason=reason.value, held_text=held)

    def _is_stop_token(self, token: int, eos_token_ids: frozenset[int]) -> bool:
        if token in self.params.stop_token_ids:
            return True
        return token in eos_token_ids and not self.params.ignore_eos
