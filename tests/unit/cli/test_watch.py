"""What the live view computes: rates, latencies by stage, moves; and how it is drawn and figures are written."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from l4queue.cli.watch.view import fit, number, time_text
from l4queue.cli.watch.window import WatchWindow
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.observe.overview import Overview, QueueView
from l4queue.observe.watch import Look, RecentMove
from l4queue.protocol.reads import FinishedRequest

T0_MS = 1_800_000_000_000
PLAN = Plan(
    version=2,
    stages=(
        StagePlan(low_tokens=0, high_tokens=512, num_workers=1, worker_ids=("a",)),
        StagePlan(low_tokens=512, high_tokens=None, num_workers=1, worker_ids=("b",)),
    ),
)
MOVE = RecentMove(
    at_ms=T0_MS, request_id="r" * 32, kind="hand-over", source="a", target="b", benefit_ms=320.0, cost_ms=110.0
)


def worker(name: str, stage: int, **given: Any) -> WorkerLoad:
    """A worker with 10 slots and 1,000 tokens of KV cache."""
    return WorkerLoad(worker_id=name, stage=stage, max_running=10, kv_capacity_tokens=1000, **given)


def finished(number_: int, prompt_tokens: int, *, ttft_ms: int, e2e_ms: int, at_ms: int) -> FinishedRequest:
    """A request that ended well, with 11 tokens."""
    submitted_ms = at_ms - e2e_ms
    return FinishedRequest(
        request_id=str(number_),
        state="done",
        prompt_tokens=prompt_tokens,
        output_tokens=11,
        submitted_ms=submitted_ms,
        started_ms=submitted_ms,
        first_token_ms=submitted_ms + ttft_ms,
        finished_ms=at_ms,
        stage="0",
        worker="a",
    )


def look(at_s: float, *, counts: dict[str, int] | None = None, **given: Any) -> Look:
    """One look, so many seconds after the first."""
    overview = Overview(
        now_ms=T0_MS + int(1000 * at_s),
        plan=given.pop("plan", PLAN),
        workers=given.pop("workers", (worker("a", 0, num_running=9), worker("b", 1))),
        costs=(None, None),
        prices=(),
        queues=given.pop("queues", {}),
        inbox=0,
        counts=counts or {},
    )
    return Look(overview=overview, **({"ages_ms": {}, "finished": (), "moves": ()} | given))


def test_rates_are_of_the_last_ten_seconds() -> None:
    """Not of the whole minute, and not of the last two seconds alone."""
    window = WatchWindow()
    for at_s, done in ((0, 0), (20, 2000), (28, 2080), (30, 2100)):
        picture = window.add(look(at_s, counts={"done": done, "submitted": done, "output_tokens": 3 * done}))

    assert picture.rates.done_per_s == 10.0
    assert picture.rates.output_tokens_per_s == 30.0


def test_counts_that_fall_begin_anew_instead_of_being_negative() -> None:
    """Another Redis, or one that has lost its data."""
    window = WatchWindow()
    window.add(look(0, counts={"done": 500, "handovers": 9}))

    picture = window.add(look(2, counts={"done": 3, "handovers": 1}))

    assert picture.rates.done_per_s is None
    assert picture.moved["handovers"] == 0


def test_latencies_are_by_the_range_of_the_prompt_and_forgotten_after_a_minute() -> None:
    """Median and 99th percentile by nearest rank; time for a token without the first one."""
    window = WatchWindow()
    early = finished(0, 100, ttft_ms=99, e2e_ms=9999, at_ms=T0_MS - 59_000)
    short = [finished(i, 100, ttft_ms=i, e2e_ms=100 + i, at_ms=T0_MS) for i in range(1, 101)]
    long = [finished(900, 512, ttft_ms=50, e2e_ms=1050, at_ms=T0_MS)]
    window.add(look(0, finished=(*reversed(short), *long, early)))

    picture = window.add(look(2))

    first, second, both = picture.latencies
    assert (first.stage, first.num_requests, first.ttft_ms, first.e2e_ms) == (0, 100, (50, 99), (150, 199))
    assert first.tpot_ms == (10.0, 10.0)
    assert (second.num_requests, second.tpot_ms) == (1, (100.0, 100.0))
    assert (both.stage, both.num_requests) == (None, 101)
    assert window.add(look(70)).latencies[2].num_requests == 0


def test_a_move_that_is_told_of_again_is_kept_once() -> None:
    """A ledger is read again while its request runs."""
    window = WatchWindow()
    window.add(look(0, moves=(MOVE,)))

    picture = window.add(look(2, moves=(MOVE,)))

    assert picture.moves == (MOVE,)


def test_what_waits_for_a_worker_alone_counts_for_its_stage() -> None:
    """And the age is that of the one that waits longest."""
    queues = {
        "0": QueueView(num_requests=2, tokens=20),
        "@a": QueueView(num_requests=1, tokens=700),
        "solo": QueueView(num_requests=1, tokens=5),
    }

    picture = WatchWindow().add(look(0, queues=queues, ages_ms={"0": 100, "@a": 900, "solo": 5}))

    waiting = picture.stages[0].waiting
    assert (waiting.num_requests, waiting.tokens, waiting.oldest_ms) == (3, 720, 900)
    assert picture.stages[1].waiting.oldest_ms is None
    assert picture.solo.num_requests == 1


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (80, 40), (104, 30), (200, 60)])
def test_it_never_exceeds_the_terminal(columns: int, rows: int) -> None:
    """With more workers than fit, long names and all that can be shown; figures are never cut."""
    workers = tuple(
        worker(
            f"worker@a-very-long-host-name-{i}", i % 2, num_running=10, num_finished=999_999, context_tokens=9**9
        )
        for i in range(50)
    )
    counts = dict.fromkeys(("done", "live", "failed", "dead", "cancelled", "handovers", "steals_waiting"), 10**7)
    rows_of = tuple(finished(i, 100, ttft_ms=123_456, e2e_ms=7_999_999, at_ms=T0_MS) for i in range(2000))
    picture = WatchWindow().add(
        look(0, workers=workers, counts=counts, finished=rows_of, moves=(MOVE,), ages_ms={"0": 10**7})
    )
    console = Console(width=columns, height=rows, file=io.StringIO(), color_system=None)
    console.print(fit(picture, console, title="l4queue", trouble="for 3 s: Redis is away"))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()

    assert len(lines) <= rows
    assert max(map(len, lines)) <= columns
    assert " more " in "\n".join(lines)
    cut = [line for line in lines[4:] if "…" in line and "worker@" not in line and " more" not in line]
    assert cut == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7.25, "7.2"),
        (812, "812"),
        (999.4, "999"),
        (3_400, "3.4k"),
        (51_000, "51k"),
        (999_600, "1.0M"),
        (12_345_678, "12M"),
        (2e9, "2.0G"),
    ],
)
def test_counts_are_written_short(value: float, text: str) -> None:
    """At most five characters."""
    assert number(value) == text


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (None, "–"),
        (0, "0 ms"),
        (0.4, "0.4 ms"),
        (85, "85 ms"),
        (999.4, "999 ms"),
        (1_200, "1.2 s"),
        (34_000, "34 s"),
        (99_499, "99 s"),
        (720_000, "12 min"),
        (12_240_000, "3.4 h"),
    ],
)
def test_times_carry_their_unit(ms: float | None, text: str) -> None:
    """Two digits are enough to act on."""
    assert time_text(ms) == text
