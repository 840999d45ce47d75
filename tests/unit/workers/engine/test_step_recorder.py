"""Step records from vLLM's per-step statistics: against a batch whose true shapes are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.cost.step import BatchShape, StepCost
from l4queue.models import SamplingParams
from workers.engine.base import EngineRequest
from workers.engine.emulated.scheduler import EmulatedBatch
from workers.engine.vllm.step_recorder import StepWatch

COST = StepCost(
    alpha_ms=1, beta_ms=1, gamma_ms=1, pi_ms=1, psi_ms=1, max_batched_tokens=64, max_num_seqs=5
)  # no KV limit: what is computed again is not told apart by vLLM


def statistics(
    *, prefill: int = 0, decodes: int = 0, generated: int | None = None, drafts: tuple[int, int] | None = None
) -> Any:
    """vLLM's SchedulerStats of one step, as far as they are read."""
    details = SimpleNamespace(
        is_dummy=False,
        elapsed_ms=7.0,
        num_ctx_tokens=prefill,
        num_generation_requests=decodes,
        num_generation_tokens=decodes if generated is None else generated,
    )
    return SimpleNamespace(
        num_running_reqs=3,
        num_waiting_reqs=2,
        num_skipped_waiting_reqs=1,
        kv_cache_usage=0.5,
        iteration_details=details,
        spec_decoding_stats=drafts and SimpleNamespace(num_draft_tokens=drafts[0], num_accepted_tokens=drafts[1]),
    )


def iteration(*, cached: int = 0, gaps_s: tuple[float, ...] = (), preempted: int = 0) -> Any:
    """vLLM's IterationStats of one step, as far as they are read."""
    return SimpleNamespace(
        prompt_token_stats=SimpleNamespace(cached_tokens=cached),
        inter_token_latencies_iter=list(gaps_s),
        num_preempted_reqs=preempted,
    )


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 300), st.integers(1, 20), st.integers(-1, 1)), max_size=10
    ),
    aborted=st.sets(st.integers(0, 9), max_size=3),
)
def test_the_watch_finds_out_what_every_step_worked_on(
    rows: list[tuple[int, int, int, int]], aborted: set[int]
) -> None:
    """Contexts, query-key pairs and skew, from token counts alone; arrivals and aborts at any step."""
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens)
    batch, step, shapes = EmulatedBatch(COST), 0, list[BatchShape]()
    lengths = {str(i): prompt for i, (_, prompt, _, _) in enumerate(rows)}
    while batch or step <= 30:
        for index, (arrival, prompt, output, priority) in enumerate(rows):
            if arrival == step:
                batch.add(
                    EngineRequest(
                        request_id=str(index),
                        token_ids=[1] * prompt,
                        max_tokens=output,
                        min_tokens=0,
                        params=SamplingParams(),
                        priority=priority,
                    )
                )
                watch.arrived(str(index), num_tokens=prompt, priority=priority)
            if index in aborted and arrival + 2 == step:
                batch.abort([str(index)])
                watch.left(str(index))
        step += 1
        shape = batch.schedule()
        if not batch:
            continue
        shapes.append(shape)
        outputs = batch.finish()
        watch.record(statistics(prefill=shape.prefill_tokens, decodes=shape.num_decodes), iteration())
        for item in outputs:
            lengths[item.request_id] += 1
            watch.grew(item.request_id, length_tokens=lengths[item.request_id])
            if item.finish_reason is not None:
                watch.left(item.request_id)

    records = watch.take_records()
    assert watch.num_steps == len(shapes)
    assert watch.take_records() == []
    for record, shape in zip(records, shapes, strict=True):
        assert record.num_decodes == shape.num_decodes
        assert record.context_tokens == shape.context_tokens
        assert record.prefill_tokens == shape.prefill_tokens
        assert record.prefill_pairs == pytest.approx(shape.prefill_pairs)
        assert record.skew_tokens == pytest.approx(shape.skew_tokens)


def test_steps_may_be_recorded_before_their_tokens_are_seen() -> None:
    """A busy worker reads outputs late: contexts are right all the same."""
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens)
    watch.arrived("a", num_tokens=100, priority=0)
    for prefill in (64, 36):
        watch.record(statistics(prefill=prefill), iteration())
    for _ in range(3):
        watch.record(statistics(decodes=1), iteration())
    for length_tokens in (101, 102, 103, 104):
        watch.grew("a", length_tokens=length_tokens)
    watch.record(statistics(decodes=1), iteration())

    assert [record.context_tokens for record in watch.take_records()] == [0, 0, 101, 102, 103, 104]


def test_a_step_lasts_from_token_to_token() -> None:
    """The least gap of the requests that decode, in ms; without one, what the core measured."""
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens)
    watch.record(statistics(decodes=2), iteration(gaps_s=(0.5, 0.012)))
    assert watch.last_step_ms == pytest.approx(12.0)
    watch.record(statistics(prefill=10), iteration())
    assert watch.last_step_ms == 7.0

    assert [record.elapsed_ms for record in watch.take_records()] == pytest.approx([12.0, 7.0])
    assert (watch.num_running, watch.num_waiting, watch.kv_share) == (3, 3, 0.5)


def test_tokens_of_the_prefix_cache_lie_before_the_chunk() -> None:
    """900 of 1,000 tokens cached: 100 computed, each attending to the 900 before."""
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens)
    watch.arrived("a", num_tokens=1000, priority=0)
    watch.record(statistics(prefill=100), iteration(cached=900))

    assert watch.take_records()[0].prefill_pairs == 100 * (900 + 50)


def test_what_a_preempted_request_computes_again_is_prefill() -> None:
    """vLLM counts it as generated: 2 requests, 301 tokens."""
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens)
    watch.record(statistics(decodes=2, generated=301), iteration())

    record = watch.take_records()[0]
    assert (record.num_decodes, record.prefill_tokens, record.prefill_pairs) == (2, 299, 299**2 / 2)


def test_accepted_drafts_are_tokens_of_the_step_and_no_prefill() -> None:
    """4 requests, 3 drafts each, 6 of them right: 2.5 tokens for each."""
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens)
    watch.record(statistics(decodes=4, generated=16, drafts=(12, 6)), iteration())
    watch.record(statistics(prefill=5, drafts=(0, 0)), iteration())

    drafted, prefill = watch.take_records()
    assert (drafted.num_decodes, drafted.prefill_tokens, drafted.tokens_per_decode) == (4, 0, 2.5)
    assert prefill.tokens_per_decode == 1


def test_reports_without_a_step_change_nothing() -> None:
    """No statistics, or those of an idle turn, are no progress."""
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens)
    watch.record(None, None)
    idle = statistics()
    idle.iteration_details = None
    watch.record(idle, iteration())

    assert watch.num_steps == 0
    assert watch.take_records() == []


def test_what_the_engine_puts_back_is_counted() -> None:
    """For ever: it only grows."""
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens)
    for preempted in (2, 0, 1):
        watch.record(statistics(decodes=1), iteration(preempted=preempted))
    assert watch.num_preemptions == 3


def test_a_step_that_ends_no_token_is_timed_from_the_one_before_or_from_the_end_of_a_pause() -> None:
    """Whatever vLLM says of it: where the model runs in the core's process, that is the sampling alone."""
    now_s = 100.0
    watch = StepWatch(max_chunk_tokens=COST.max_chunk_tokens, clock=lambda: now_s)
    now_s = 200.0
    watch.arrived("a", num_tokens=100, priority=0)
    now_s = 200.05
    watch.record(statistics(prefill=64), iteration())
    now_s = 200.08
    watch.record(statistics(prefill=36), iteration())
    now_s = 200.09
    watch.record(statistics(decodes=1), iteration(gaps_s=(0.012,)))

    assert [record.elapsed_ms for record in watch.take_records()] == pytest.approx([50.0, 30.0, 12.0])
