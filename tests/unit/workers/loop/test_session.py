"""One request over many workers: cut anywhere, each time with all that was committed, it ends as if uncut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from l4queue.models import RequestBody, RequestState, SamplingParams
from l4queue.protocol.records import (
    Grant,
    Outcome,
    OutputEntry,
    TokenLogprobs,
    pack_ids,
    pack_logprobs,
    unpack_logprobs,
)
from l4queue.tiny import make_tiny_tokenizer
from workers.engine.base import EngineOutput, EngineRequest, FinishReason
from workers.loop.session import Session, resumed_seed
from workers.loop.text import StreamDecoder, TextStream
from workers.telemetry.observer import PREVIEW_CHARS

EOS = 1
PROMPT = (300, 301, 302)
TEXT = (
    "Größe, 你好 <END> 👩‍👩‍👧‍👦 of the world.\n\nAnd then 👍🏽 <END> naïve façade, at the end of the text; 世界。"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tiny model's: bytes and merges, so that most of these characters are several tokens."""
    return make_tiny_tokenizer().backend_tokenizer


class Wanted:
    """What a client reads of one request: the stream's entries in order, and the end."""

    def __init__(self) -> None:
        self.entries: list[OutputEntry] = []
        self.outcome: Outcome | None = None

    def write(self, session: Session) -> None:
        """Take what the session would write now, as the scripts do: at the offset, and nowhere else."""
        write = session.take_write()
        if write is None:
            return
        assert write.offset == self.offset
        if write.token_ids:
            upto = write.offset + len(write.token_ids)
            packed = pack_logprobs(write.logprobs)  # as it travels
            logprobs = unpack_logprobs(packed, len(write.token_ids)) if packed else None
            entry = OutputEntry(upto=upto, token_ids=write.token_ids, text=write.text, logprobs=logprobs)
            self.entries.append(entry)
        self.outcome = write.outcome

    @property
    def offset(self) -> int:
        return self.entries[-1].upto if self.entries else 0

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of all tokens, in order."""
        return [row for entry in self.entries for row in entry.logprobs or ()]

    @property
    def whole(self) -> tuple[tuple[int, ...], str, str]:
        """Token ids, text and why it ended."""
        assert self.outcome is not None
        ids = tuple(token for entry in self.entries for token in entry.token_ids)
        text = "".join(entry.text for entry in self.entries) + self.outcome.held_text
        return ids, text, self.outcome.finish_reason


def open_session(tokenizer: Any, params: SamplingParams, wanted: Wanted, *, epoch: int) -> Session:
    """What a worker makes of a grant and the output so far."""

    def make_text(p: SamplingParams) -> TextStream:
        silent = frozenset(p.stop_token_ids)
        return TextStream(StreamDecoder(tokenizer), stop=p.stop, min_tokens=p.min_tokens, silent_ids=silent)

    grant = Grant(
        request_id="r",
        epoch=epoch,
        body=RequestBody(params=params).model_dump_json(exclude_defaults=True).encode(),
        packed_ids=pack_ids(PROMPT),
        offset=wanted.offset,
        prompt_tokens=len(PROMPT),
        crashes=0,
        score=0.0,
        submitted_ms=0,
        deadline_ms=None,
        stage="0",
    )
    session = Session(grant, incarnation="w", stage=0, range_text="", started_s=0.0, make_text=make_text)
    session.resume(wanted.entries, eos_token_ids=frozenset({EOS}))
    return session


def logprobs_at(place: int, token: int) -> TokenLogprobs:
    """What the engine says of the token there: no place has those of another."""
    return TokenLogprobs(token_id=token, logprob=-float(place), top=((token, -float(place)), (7, -place - 0.5)))


def generate(request: EngineRequest, source: Sequence[int], num_tokens: int) -> list[EngineOutput]:
    """At most so many steps of an engine that would write `source` behind the prompt, by the engine's rules."""
    outputs = []
    done = len(request.token_ids) - len(PROMPT)
    assert list(request.token_ids) == [*PROMPT, *source[:done]]
    for number, token in enumerate(source[done : done + num_tokens], start=1):
        ends = token in request.params.stop_token_ids or (token == EOS and not request.params.ignore_eos)
        reason = FinishReason.STOP if ends and number >= request.min_tokens else None
        if reason is None and number >= request.max_tokens:
            reason = FinishReason.LENGTH
        asked = request.params.logprobs is not None
        outputs.append(
            EngineOutput(
                request_id=request.request_id,
                token_ids=(token,),
                finish_reason=reason,
                logprobs=(logprobs_at(done + number, token),) if asked else (),
            )
        )
        if reason is not None:
            break
    return outputs


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_of_sequence_gives_no_text_whatever_the_tokenizer_calls_it(ignore_eos: bool) -> None:
    """As in vLLM: one that is a token like any other has its text where it does not end the output."""
    plain = json.loads(make_tiny_tokenizer().backend_tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["id"] != EOS]
    words = Tokenizer.from_str(json.dumps(plain))
    assert words.decode([EOS], skip_special_tokens=True) == "</s>"
    source = [*words.encode("the end").ids, EOS]
    params = SamplingParams(max_tokens=len(source), ignore_eos=ignore_eos)

    for leases in ([], [(1, 0)], [(len(source), 0)]):
        ids, text, reason = run(words, params, source, leases).whole
        assert list(ids) == source
        assert text == ("the end</s>" if ignore_eos else "the end")
        assert reason == ("length" if ignore_eos else "stop")


def test_the_preview_has_as_many_characters_as_are_shown(tokenizer: Any) -> None:
    """docs/flower.md promises them."""
    source = tokenizer.encode("x" * 2 * PREVIEW_CHARS).ids
    wanted = Wanted()
    session = open_session(tokenizer, SamplingParams(max_tokens=len(source)), wanted, epoch=1)
    for output in generate(session.engine_request(), source, len(source)):
        session.feed(output)
    assert session.text_preview == "x" * PREVIEW_CHARS


@pytest.mark.parametrize(("body", "expected"), [(b"{}", 256), (b'{"params":{"max_tokens":9}}', 9)])
def test_a_body_without_max_tokens_is_one_of_the_earlier_release(
    tokenizer: Any, body: bytes, expected: int
) -> None:
    """Its client left the default out; today's dispatcher writes what still fits."""
    grant = Grant(
        request_id="r",
        epoch=1,
        body=body,
        packed_ids=pack_ids(PROMPT),
        offset=0,
        prompt_tokens=len(PROMPT),
        crashes=0,
        score=0.0,
        submitted_ms=0,
        deadline_ms=None,
        stage="0",
    )
    session = Session(
        grant, incarnation="w", stage=0, range_text="", started_s=0.0, make_text=lambda _: TextStream(None)
    )
    session.resume([], eos_token_ids=frozenset())
    assert session.engine_request().max_tokens == expected


def run(
    tokenizer: Any, params: SamplingParams, source: Sequence[int], leases: Sequence[tuple[int, int]]
) -> Wanted:
    """A request through leases of so many tokens each, of which the last few are lost; the last takes the rest."""
    wanted = Wanted()
    for epoch, (num_tokens, num_lost) in enumerate([*leases, (len(source), 0)], start=1):
        session = open_session(tokenizer, params, wanted, epoch=epoch)
        if not session.has_ended:
            outputs = generate(session.engine_request(), source, num_tokens)
            for output in outputs[: max(0, len(outputs) - num_lost)]:
                session.feed(output)
                wanted.write(session)
                if session.has_ended:
                    return wanted
        else:
            wanted.write(session)
            return wanted
    raise AssertionError("it never ended")


@settings(max_examples=150, deadline=None)
@given(
    begin=st.integers(0, 60),
    eos_at=st.integers(0, 60),
    params=st.builds(
        SamplingParams,
        max_tokens=st.integers(20, 60),
        min_tokens=st.integers(0, 20),
        stop=st.lists(st.sampled_from(["<END>", "\n\n", "好 <", "👩‍👧", "end of"]), max_size=2).map(tuple),
        stop_token_ids=st.lists(st.integers(0, 7), max_size=1).map(tuple),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, 2]),
    ),
    leases=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=8),
)
def test_cut_anywhere_it_ends_as_if_uncut(
    tokenizer: Any, begin: int, eos_at: int, params: SamplingParams, leases: list[tuple[int, int]]
) -> None:
    """max_tokens, min_tokens, stop strings and tokens over the cut, characters of many tokens, lost writes.

    Logprobs: one for each token that is kept, none lost or doubled.
    """
    source = (tokenizer.encode(TEXT).ids * 2)[begin : begin + 80]
    source.insert(eos_at, EOS)
    params = params.model_copy(update={"stop_token_ids": tuple(source[i * 5] for i in params.stop_token_ids)})

    cut = run(tokenizer, params, source, leases)
    assert cut.whole == run(tokenizer, params, source, []).whole
    told = [logprobs_at(place, token) for place, token in enumerate(cut.whole[0], start=1)]
    assert cut.logprobs == (told if params.logprobs is not None else [])


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_stop_string_that_spans_the_cut_is_found_and_never_shown(tokenizer: Any, cut: int) -> None:
    """Its first half is held back by one worker, the second comes from another."""
    source = tokenizer.encode("the answer is 42 </answer> and more").ids
    ids, text, reason = run(tokenizer, SamplingParams(stop=("</answer>",)), source, [(cut, 0)]).whole

    assert (text, reason) == ("the answer is 42 ", "stop")
    assert tokenizer.decode(ids).startswith("the answer is 42 </answer>")


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_character_that_spans_the_cut_is_written_once_and_whole(tokenizer: Any, cut: int) -> None:
    """Four bytes, up to four tokens; no entry of the stream has half of it."""
    source = tokenizer.encode("é👍🏽世").ids
    wanted = run(tokenizer, SamplingParams(max_tokens=len(source)), source, [(cut, 0)])

    assert wanted.whole[1] == "é👍🏽世"
    assert not any("\ufffd" in entry.text for entry in wanted.entries)


def test_a_resumed_request_draws_other_random_numbers_and_the_same_ones_each_time(tokenizer: Any) -> None:
    """The seed is the request's own until the first cut; then it depends on seed and place alone."""
    params, wanted = SamplingParams(seed=7), Wanted()
    assert open_session(tokenizer, params, wanted, epoch=1).engine_request().params == params
    seeds = []
    for upto in (1, 2, 2):
        wanted.entries = [OutputEntry(upto=upto, token_ids=(300,) * upto, text="a")]
        request = open_session(tokenizer, params, wanted, epoch=2).engine_request()
        assert request.params == params.model_copy(update={"seed": resumed_seed(7, upto)})
        seeds.append(request.params.seed)

    assert seeds[0] != seeds[1] == seeds[2]
    assert seeds[:2] == [8483367915304847654, 3068249057399463944]  # workers of two versions agree
    drawn = {resumed_seed(seed, place) for seed in (-(2**63), 0, 7, 2**63 - 1) for place in range(1, 500)}
    assert len(drawn) == 4 * 499
    assert all(0 <= seed < 2**63 for seed in drawn)
    unseeded = open_session(tokenizer, SamplingParams(), wanted, epoch=2).engine_request()
    assert unseeded.params.seed is None


def test_what_has_run_before_goes_first_in_its_class_and_tells_its_first_token_at_once(tokenizer: Any) -> None:
    """It has waited already; whoever reads along has seen it stop."""
    wanted = Wanted()
    fresh = open_session(tokenizer, SamplingParams(), wanted, epoch=1)
    wanted.entries = [OutputEntry(upto=2, token_ids=(300, 301), text="a")]
    resumed = open_session(tokenizer, SamplingParams(), wanted, epoch=2)
    assert resumed.engine_request().priority == fresh.engine_request().priority - 1
    fresh.priority = -1
    assert fresh.engine_request().priority < resumed.engine_request().priority

    assert not resumed.is_urgent
    resumed.feed(EngineOutput(request_id=resumed.engine_id, token_ids=(302,)))
    assert resumed.is_urgent
    wanted.write(resumed)
    resumed.feed(EngineOutput(request_id=resumed.engine_id, token_ids=(303,)))
    assert not resumed.is_urgent


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"structured_outputs": {"regex": "a+"}},
    ],
)
def test_what_is_pinned_writes_nothing_before_its_end_and_never_moves(
    tokenizer: Any, fields: dict[str, Any]
) -> None:
    """So that whoever begins again may write something else."""
    params, wanted = SamplingParams.model_validate({"max_tokens": 3, **fields}), Wanted()
    session = open_session(tokenizer, params, wanted, epoch=1)
    *first, last = generate(session.engine_request(), [300, 301, 302], 3)
    for output in first:
        session.feed(output)
        assert session.take_write() is None
        assert not session.may_move
        assert not session.is_urgent
    session.feed(last)
    wanted.write(session)

    assert wanted.whole[0] == (300, 301, 302)
    assert wanted.outcome is not None
    assert wanted.outcome.state is RequestState.DONE
