"""The vLLM engine behind the seam, on the tiny model: one start for all. Constraints have a module of theirs."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from l4queue.models import SamplingParams
from l4queue.protocol.records import CachedPrompt
from tests.services.served import (
    EOS_PROMPT,
    GREEDY,
    Served,
    expect_death,
    prompt,
    reference,
    reference_logprobs,
    signal_core,
)
from workers.engine.base import FinishReason
from workers.engine.vllm.engine import VllmEngine
from workers.loop.session import resumed_seed
from workers.loop.text import text_factory
from workers.tiny import build_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

MAX_MODEL_LEN = 4096
MAX_BATCHED_TOKENS = 512
MAX_RUNNING = 16
EOS_AT = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory, without_compiler: None) -> AsyncIterator[Served]:
    """An engine whose model also ends at the token that greedy decoding gives EOS_AT tokens after EOS_PROMPT."""
    folder = tmp_path_factory.mktemp("model")
    model = folder / "with-eos"
    shutil.copytree(build_tiny_model(folder), model)
    expected = reference(model, EOS_PROMPT, 2 * EOS_AT)
    generation = json.loads((model / "generation_config.json").read_text())
    generation["eos_token_id"] = [generation["eos_token_id"], expected[EOS_AT]]
    (model / "generation_config.json").write_text(json.dumps(generation))
    engine = VllmEngine(
        str(model),
        max_model_len=MAX_MODEL_LEN,
        max_running=MAX_RUNNING,
        dtype="float32",
        max_batched_tokens=MAX_BATCHED_TOKENS,
        vllm_args="--seed 7 --chat-template-content-format string",
    )
    info = await engine.start()
    yield Served(engine=engine, info=info, expected=expected)
    await engine.stop()
    await engine.stop()


async def test_the_engine_says_what_it_is(served: Served) -> None:
    """Its limits are those asked for; the cache is sized; both ends of sequence are known."""
    info = served.info
    assert (info.max_model_len, info.max_running, info.max_batched_tokens) == (
        MAX_MODEL_LEN,
        MAX_RUNNING,
        MAX_BATCHED_TOKENS,
    )
    assert info.kv_capacity_tokens > 10 * MAX_MODEL_LEN
    assert info.has_prefix_cache
    assert served.engine._llm.model_config.seed == 7
    assert served.engine.stats().num_running == 0
    assert served.engine.step_records() == [], "of the rehearsals"
    assert info.eos_token_ids == {1, served.expected[EOS_AT]}


async def test_end_of_sequence_ends_unless_ignored_or_too_early(served: Served) -> None:
    """The first token of that id is the last; with ignore_eos it is one like any other, as in transformers."""
    first = served.expected.index(served.expected[EOS_AT]) + 1
    tokens, last = await served.one(EOS_PROMPT, 2 * EOS_AT, params=SamplingParams(temperature=0.0))
    assert (tokens, last.finish_reason) == (served.expected[:first], FinishReason.STOP)

    tokens, last = await served.one(EOS_PROMPT, 2 * EOS_AT)
    assert (tokens, last.finish_reason) == (served.expected, FinishReason.LENGTH)

    params = SamplingParams(temperature=0.0)
    tokens, _ = await served.one(EOS_PROMPT, 2 * EOS_AT, params=params, min_tokens=first + 3)
    assert len(tokens) >= first + 3
    assert tokens[: first - 1] == served.expected[: first - 1]


async def test_text_is_that_of_vllm(served: Served) -> None:
    """Also at its end: an end of sequence that the tokenizer does not call special gives none, unless ignored."""
    from vllm import SamplingParams as VllmParams
    from vllm.inputs import tokens_input

    make_text = text_factory(served.info.model)
    end = served.expected[EOS_AT]
    for number, params in enumerate(
        (
            SamplingParams(temperature=0.0),
            GREEDY,
            SamplingParams(temperature=0.0, stop_token_ids=(served.expected[2],)),
            GREEDY.model_copy(update={"stop_token_ids": (end,)}),
        )
    ):
        asked = VllmParams(
            temperature=0.0,
            max_tokens=2 * EOS_AT,
            ignore_eos=params.ignore_eos,
            stop_token_ids=list(params.stop_token_ids),
        )
        llm = served.engine._llm
        async for out in llm.generate(tokens_input(EOS_PROMPT), asked, f"of-vllm-{number}"):
            theirs = out.outputs[0]
        tokens, _ = await served.one(EOS_PROMPT, 2 * EOS_AT, params=params)
        stream = make_text(params)
        if not params.ignore_eos:
            stream.silence(served.info.eos_token_ids)
        stream.prime(EOS_PROMPT)

        assert tokens == list(theirs.token_ids)
        assert stream.feed(tokens).text + stream.flush() == theirs.text


async def test_stop_tokens_end_and_are_kept(served: Served) -> None:
    """The id that ended the output is its last."""
    stop = served.expected[5]
    params = GREEDY.model_copy(update={"stop_token_ids": (stop,)})
    tokens, last = await served.one(EOS_PROMPT, 20, params=params)

    assert tokens == served.expected[: served.expected.index(stop) + 1]
    assert last.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("num_tokens", [20, 700])
async def test_a_cut_and_resumed_request_is_identical(served: Served, num_tokens: int) -> None:
    """Prompt and generated ids as a new prompt give the same rest, wherever the cut; all cuts at once."""
    ids = prompt(num_tokens, num_tokens)
    whole, _ = await served.one(ids, 48)
    assert len(set(whole)) > 10
    cuts = (1, 2, 3, 7, 11, 16, 23, 31, 40, 45, 47)

    for cut in cuts:
        await served.add(str(cut), ids + whole[:cut], 48 - cut)
    rest = await served.collect(map(str, cuts))

    assert [rest[str(cut)][0] for cut in cuts] == [whole[cut:] for cut in cuts]


async def test_alone_or_in_a_batch_the_tokens_are_the_same(served: Served) -> None:
    """Sixteen prompts of 5 to 2,000 tokens, one by one, then all together in reverse."""
    prompts = {str(i): prompt(i, int(n)) for i, n in enumerate(np.geomspace(5, 2000, MAX_RUNNING))}
    alone = {name: (await served.one(ids, 24))[0] for name, ids in prompts.items()}

    for name, ids in reversed(prompts.items()):
        await served.add(name, ids, 24)
    together = await served.collect(prompts)

    assert {name: tokens for name, (tokens, _) in together.items()} == alone


async def test_cached_tokens_are_those_of_vllm(served: Served) -> None:
    """Told with the first tokens, as vLLM tells them itself; the tokens are those of an engine without a cache."""
    from vllm import SamplingParams as VllmParams
    from vllm.inputs import tokens_input

    ids = prompt(78, 600)
    expected, last = await served.one(ids, 1)
    assert last.cached is not None
    assert last.cached.found_tokens == 0
    assert 400 < (last.cached.made_tokens or 0) <= 600
    tokens, last = await served.one(ids, 1)
    asked = served.engine._llm.generate(tokens_input(ids), VllmParams(temperature=0.0, max_tokens=1), "plain")
    plain = [output async for output in asked][-1]
    found = CachedPrompt(found_tokens=plain.num_cached_tokens, made_tokens=plain.num_cache_creation_tokens)
    assert last.cached == found
    assert last.cached.found_tokens > 400
    assert tokens == expected == reference(Path(served.info.model), ids, 1)


async def test_a_long_prompt_is_computed_in_chunks_and_measured(served: Served) -> None:
    """No step takes more than the budget; the records account for every prompt token and every pair."""
    served.engine.step_records()
    num_steps = served.engine.stats().num_steps
    await served.one(prompt(77, 3000), 5)

    records = served.engine.step_records()
    assert len(records) == served.engine.stats().num_steps - num_steps
    prefills = [record.prefill_tokens for record in records if record.prefill_tokens]
    assert sum(prefills) == 3000
    assert max(prefills) == MAX_BATCHED_TOKENS
    assert sum(record.prefill_pairs for record in records) == pytest.approx(3000**2 / 2)
    decodes = [record for record in records if record.num_decodes]
    assert [record.context_tokens for record in decodes] == [3001, 3002, 3003, 3004]
    assert all(record.elapsed_ms > 0 for record in records)


async def test_aborted_requests_fall_silent_and_the_others_go_on(served: Served) -> None:
    """Ids that are unknown, or have not reached the engine yet, do no harm."""
    await served.add("short", prompt(1, 30), 30)
    for name in ("a", "b"):
        await served.add(name, prompt(2, 30), 4000)
    seen: set[str] = set()
    while not {"a", "b"} <= seen:
        seen |= {output.request_id for output in await served.engine.outputs()}
    await served.add("c", prompt(3, 30), 4000)
    await served.engine.abort(["a", "b", "c", "unknown"])

    await served.add("after", prompt(4, 30), 60)
    left = {"short", "after"}
    while "after" in left:
        for output in await served.engine.outputs():
            assert output.request_id in {"short", "after"}
            if output.finish_reason is not None:
                left.discard(output.request_id)
    assert served.engine.stats().num_running == 0


async def test_long_prompts_take_turns_and_starve_nobody(served: Served) -> None:
    """While vLLM prefills two at once, what came after them gets no token. One that is aborted has no turn."""
    for index, name in enumerate(("first", "gone", "second")):
        await served.add(name, prompt(500 + index, 3000), 2)
    await served.add("short", prompt(510, 20), 40)
    assert served.engine.stats().num_waiting == 2
    await served.engine.abort(["gone"])

    begun: dict[str, int] = {}  # tokens of the short one when another has its first
    num_tokens, left = 0, {"first", "second", "short"}
    while left:
        for output in await served.engine.outputs():
            if output.request_id == "short":
                num_tokens += len(output.token_ids)
            else:
                begun.setdefault(output.request_id, num_tokens)
            if output.finish_reason is not None:
                left.remove(output.request_id)

    assert list(begun) == ["first", "second"]
    assert begun["first"] >= 4  # 3,000 tokens take seven steps
    assert begun["second"] >= begun["first"] + 4


@pytest.mark.parametrize(
    ("ids", "max_tokens", "words"),
    [([10**6], 4, "vocab"), ([], 4, "empty"), ([5] * (MAX_MODEL_LEN + 1), 4, "length")],
)
async def test_what_cannot_be_computed_is_refused_alone(
    served: Served, ids: list[int], max_tokens: int, words: str
) -> None:
    """The neighbour finishes as if nothing had been there."""
    await served.add("good", EOS_PROMPT, 8)
    await served.add("bad", ids, max_tokens)
    ended = await served.collect(["good", "bad"])

    assert ended["good"][0] == served.expected[:8]
    tokens, last = ended["bad"]
    assert (tokens, last.finish_reason) == ([], FinishReason.ERROR)
    assert words in (last.error or "")


async def test_an_urgent_request_overtakes_those_that_wait(served: Served) -> None:
    """With every seat taken, the lower priority number is next."""
    for index in range(MAX_RUNNING):
        await served.add(f"first-{index}", prompt(index, 20), 40 + index)
    for index in range(4):
        await served.add(f"waits-{index}", prompt(100 + index, 20), 40)
    await served.add("urgent", prompt(200, 20), 40, priority=-10)
    names = [*(f"first-{i}" for i in range(MAX_RUNNING)), *(f"waits-{i}" for i in range(4)), "urgent"]
    order = list(await served.collect(names))

    assert order.index("urgent") < min(order.index(f"waits-{index}") for index in range(4))


@pytest.mark.parametrize("cut", [1, 9])
async def test_a_seeded_request_goes_on_with_other_random_numbers(served: Served, cut: int) -> None:
    """The same seed, and the same cut, give the same tokens; the rest does not draw as the beginning did."""
    params = SamplingParams(seed=11, ignore_eos=True)
    whole, _ = await served.one(EOS_PROMPT, 24, params=params)
    assert (await served.one(EOS_PROMPT, 24, params=params))[0] == whole
    rests = {}
    for name, seed in (("first", 11), ("derived", resumed_seed(11, cut)), ("again", resumed_seed(11, cut))):
        resumed = params.model_copy(update={"seed": seed})
        rests[name], _ = await served.one(EOS_PROMPT + whole[:cut], 24 - cut, params=resumed)

    assert rests["derived"] == rests["again"] != rests["first"]


async def test_seeded_prompts_in_chunks_draw_the_same_however_they_are_cut(served: Served) -> None:
    """Alone in whole chunks, in what a neighbour leaves of a step, and with most of it in the prefix cache."""
    params, ids = SamplingParams(seed=7, ignore_eos=True), prompt(71, 2 * served.info.max_batched_tokens + 90)
    alone, _ = await served.one(ids, 12, params=params)
    cached, _ = await served.one(ids, 12, params=params)
    await served.add("before", prompt(72, served.info.max_batched_tokens + 33), 12, params=params)
    await served.add("other", [*prompt(73, 16), *ids[16:]], 12, params=params)
    others = await served.collect(["before", "other"])
    again, _ = await served.one([*prompt(73, 16), *ids[16:]], 12, params=params)

    assert alone == cached
    assert others["other"][0] == again


async def test_logprobs_are_the_model_s_and_go_on_after_a_cut(served: Served) -> None:
    """One for each token, with the most probable ones in order; against transformers, cut and uncut."""
    params = GREEDY.model_copy(update={"logprobs": 5})
    tokens, _ = await served.one(EOS_PROMPT, 24, params=params)
    rows = served.logprobs["one"]
    values = reference_logprobs(Path(served.info.model), EOS_PROMPT, tokens)
    assert tokens == served.expected + tokens[2 * EOS_AT :]
    assert [row.token_id for row in rows] == tokens
    for row, told in zip(rows, values, strict=True):
        assert row.top[0] == (row.token_id, row.logprob), "greedy takes the most probable one"
        assert row.logprob == pytest.approx(told[row.token_id], abs=1e-3)
        assert [value for _, value in row.top] == pytest.approx(sorted(told, reverse=True)[:5], abs=1e-3)
        assert all(value == pytest.approx(told[token], abs=1e-3) for token, value in row.top)

    await served.one(EOS_PROMPT + tokens[:7], 17, params=params)
    for row, uncut in zip(served.logprobs["one"], rows[7:], strict=True):
        assert row.token_id == uncut.token_id
        assert row.logprob == pytest.approx(uncut.logprob, abs=1e-3)

    await served.one(EOS_PROMPT, 9, params=SamplingParams(logprobs=0, seed=3, ignore_eos=True))
    assert [len(row.top) for row in served.logprobs["one"]] == [0] * 9
    await served.one(EOS_PROMPT, 9)
    assert served.logprobs["one"] == []


async def test_without_a_compiler_logprobs_are_served_beside_others(served: Served) -> None:
    """torch would compile at the first such request, and the engine end with its neighbours."""
    assert shutil.which("c++") is shutil.which("g++") is None
    await served.add("free", EOS_PROMPT, 2 * EOS_AT)
    for num in range(4):
        params = GREEDY.model_copy(update={"logprobs": num})
        await served.add(f"asked-{num}", EOS_PROMPT, 2 * EOS_AT, params=params)
    ended = await served.collect(["free", *(f"asked-{num}" for num in range(4))])

    assert {name: tokens for name, (tokens, _) in ended.items()} == dict.fromkeys(ended, served.expected)
    assert [len(row.top) for num in range(4) for row in served.logprobs[f"asked-{num}"]] == [
        num for num in range(4) for _ in served.expected
    ]


async def test_a_core_that_is_told_to_end_ends_no_request(served: Served) -> None:
    """vLLM then aborts whatever runs; cut short is not done. Last to use the shared engine: it ends it."""
    for name in ("a", "b"):
        await served.add(name, prompt(2, 30), 4000)
    await served.engine.outputs()
    signal_core(signal.SIGTERM)

    await expect_death(served)
