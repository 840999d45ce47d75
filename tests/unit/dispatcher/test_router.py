"""Facts by which a dispatcher places: work of outputs, and the prefill rate that waiting is weighed against."""

from __future__ import annotations

import json

import pytest

from dispatcher.routing.router import Router
from l4queue.config import Settings
from l4queue.cost.coefficients import load_coefficients
from l4queue.cost.step import StepCost
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.observe.overview import Overview, QueueView
from l4queue.policy.output_lengths import FIRST_GUESS_TOKENS, OutputLengths
from l4queue.policy.queue_order import ageing_tokens_per_s, score

PLAN = Plan(
    version=1,
    stages=(
        StagePlan(low_tokens=0, high_tokens=512, num_workers=1, worker_ids=("a",)),
        StagePlan(low_tokens=512, high_tokens=None, num_workers=1, worker_ids=("b",)),
    ),
)


def overview_of(counts: dict[str, int], *, costs: tuple[StepCost | None, ...] = (None, None)) -> Overview:
    """Two stages with a worker each, and a queue before the first."""
    return Overview(
        now_ms=0,
        plan=PLAN,
        workers=(WorkerLoad(worker_id="a", stage=0), WorkerLoad(worker_id="b", stage=1)),
        costs=tuple(cost and cost.to_dict() for cost in costs),
        prices=(),
        queues={"0": QueueView(num_requests=9, tokens=900)},
        inbox=0,
        counts=counts,
    )


def drain_ms(counts: dict[str, int]) -> float:
    """How long the stage of a short prompt takes, as `explain` tells it."""
    router = Router(Settings())
    router.follow(PLAN)
    router.see(overview_of(counts), held={})
    found = json.loads(router.place(100, submitted_ms=0, priority=0).why)["drain_ms"]
    assert isinstance(found, float)
    return found


def test_before_the_first_output_the_guess_is_that_of_the_workers() -> None:
    """The same decision in dispatcher, worker and simulator begins with the same number."""
    assert OutputLengths().mean_tokens == FIRST_GUESS_TOKENS == 256
    assert (
        drain_ms({}) == drain_ms({"done": 2, "output_tokens": 512}) > drain_ms({"done": 2, "output_tokens": 256})
    )


def test_a_prompt_is_set_back_by_the_rate_that_workers_measure() -> None:
    """Before any has: by the file's. A number in the settings wins over both."""
    slow = StepCost(alpha_ms=0.0, beta_ms=0.1, gamma_ms=0.0, pi_ms=1.0, psi_ms=0.0)
    router, told = Router(Settings()), Router(Settings(ageing_tokens_per_s=500.0))

    assert router.place(1000, submitted_ms=0, priority=0).score == pytest.approx(
        score(0, 1000, ageing_tokens_per_s=ageing_tokens_per_s(load_coefficients("h100", "llama-3.1-8b")))
    )
    for each in (router, told):
        each.see(overview_of({}, costs=(None, slow)), held={})
    assert router.place(1000, submitted_ms=0, priority=0).score == pytest.approx(30_000.0)
    assert told.place(1000, submitted_ms=0, priority=0).score == pytest.approx(2_000.0)
