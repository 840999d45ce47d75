"""Records of recent traffic that plans are replayed on: requests that have ended, or as many drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from l4queue.cost.step import BLOCK_TOKENS as ENGINE_BLOCK_TOKENS
from l4queue.planning.histogram import Buckets, Demand
from l4queue.planning.planner import Snapshot
from l4queue.planning.traffic_change import Learned
from l4queue.policy.prefix_affinity import LEAST_REPEATED
from l4queue.policy.prefix_blocks import BLOCK_TOKENS, KEY_BYTES, MOST_TOLD, hash_ids, unpack_keys
from l4queue.sim.engine.request import Chain
from l4queue.sim.traces.content import Chains
from l4queue.sim.traces.trace import Trace

__all__ = (
    "FEWEST_TOLD",
    "MAX_ARRIVALS",
    "MIN_ARRIVALS",
    "Changed",
    "RecordedArrival",
    "arrivals_of",
    "chains_of",
    "record_of",
    "tells_content",
    "told_share",
)

MIN_ARRIVALS = 100
"""Fewer tell more about chance than about a plan."""
MIN_LATENCIES = 4.0
"""Mean latencies. A shorter replay ends before its queues are what they would become."""
MAX_ARRIVALS = 1500
"""Most arrivals in a replay. Chosen: more tell plans apart more surely, and take the planner longer."""
FEWEST_TOLD = 40
"""Fewest requests whose content is told that say how much comes again. Chosen: on all traces with content the
first 50 tell of less than the first 400, so few do not make a guess that more would not."""
_DRAWN = 400
"""Fewest arrivals that are drawn where a change has left fewer. Chosen: they are drawn from what is known already,
so more of them tell little more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedArrival:
    """A finished request as the recorder knows it; `e2e_s` is how long it took.

    `blocks` are the keys of its prompt's blocks, packed (`policy.prefix_blocks`); empty where nobody told them.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    e2e_s: float = 0.0
    blocks: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """The traffic has its rate since `begun_s`, its lengths since `mix_begun_s`, and is `demand` now."""

    begun_s: float
    mix_begun_s: float
    demand: Demand
    buckets: Buckets

    @classmethod
    def of(cls, learned: Learned, snapshot: Snapshot) -> Changed:
        """As learned by the time of this snapshot."""
        return cls(
            begun_s=learned.begun_s,
            mix_begun_s=learned.mix_begun_s,
            demand=snapshot.demand,
            buckets=snapshot.buckets,
        )


def record_of(
    recent: Sequence[RecordedArrival],
    *,
    changed: Changed | None,
    max_requests: int,
    needs_content: bool = False,
) -> Sequence[RecordedArrival] | None:
    """Requests to replay, in order of arrival; None where too little is known.

    Requests drawn with replacement would repeat each other's prompts. So where content is told, those known keep
    their order and get the times of the new rate, each once. Requests drawn by length tell no content; with
    `needs_content` None is better than these, if the others tell any.
    """
    if len(recent) < MIN_ARRIVALS:
        return None
    complete = _complete(recent)
    if changed is None:
        latest = complete[-max_requests:]
        return latest if _is_long_enough(latest) else None
    latest = [a for a in complete if a.arrival_s >= changed.begun_s][-max_requests:]
    alike = [a for a in complete if a.arrival_s >= changed.mix_begun_s]
    number = min(max(_DRAWN, len(alike)), max_requests)
    if len(alike) > len(latest) and len(latest) < number and len(alike) >= MIN_ARRIVALS:
        drawn = _at_rate(alike, changed, number=number)
        if _is_long_enough(drawn):
            return drawn
    if _is_long_enough(latest):
        return latest
    if len(complete) < MIN_ARRIVALS or len(latest) == len(complete):
        return None
    if needs_content and tells_content(complete):
        return None
    drawn = _drawn_anew(complete, changed, number=min(_DRAWN, max_requests))
    return drawn if _is_long_enough(drawn) else None


def arrivals_of(trace: Trace) -> list[RecordedArrival]:
    """The requests of a trace as workers would have told them; where it tells no content, all prompts are new."""
    numbers, found = count(1 << 40), []
    rows = zip(trace.arrival_s.tolist(), trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    for row, (arrival_s, prompt, output) in enumerate(rows):
        ends = range(BLOCK_TOKENS, min(prompt, MOST_TOLD * BLOCK_TOKENS) + 1, BLOCK_TOKENS)
        if trace.chains is None:
            ids = [next(numbers) for _ in ends]
        else:
            blocks = [block for span in trace.chains[row] for block in span]
            ids = [blocks[end // ENGINE_BLOCK_TOKENS - 1] for end in ends]
        keys = b"".join(number.to_bytes(KEY_BYTES, "big") for number in ids)
        found.append(RecordedArrival(arrival_s=arrival_s, input_tokens=prompt, output_tokens=output, blocks=keys))
    return found


def tells_content(record: Sequence[RecordedArrival]) -> bool:
    """Whether anything is known of what prompts have in common."""
    return any(arrival.blocks for arrival in record)


def told_share(latest: Sequence[RecordedArrival]) -> float:
    """Share of the prompt tokens that came again, of what has ended since the first prompt that was told.

    In order of the ends. 0 where that is less than `FEWEST_TOLD` requests.
    """
    first = next((number for number, arrival in enumerate(latest) if arrival.blocks), len(latest))
    told = latest[first:]
    return _repeated_share(told) if len(told) >= FEWEST_TOLD else 0.0


def _repeated_share(record: Sequence[RecordedArrival]) -> float:
    """Share of the prompt tokens that are in blocks of earlier requests."""
    seen, num_repeated = set[bytes](), 0
    for arrival in record:
        keys = unpack_keys(arrival.blocks)
        num_repeated += sum(key in seen for key in keys)
        seen.update(keys)
    return num_repeated * BLOCK_TOKENS / max(1, sum(arrival.input_tokens for arrival in record))


def chains_of(record: Sequence[RecordedArrival]) -> tuple[Chain, ...] | None:
    """The content of each request; None where less than `LEAST_REPEATED` of it comes again in this record.

    A prompt that nobody told is like no other. Blocks are as workers tell them, `prefix_blocks.BLOCK_TOKENS` each:
    an engine's smaller ones would say no more, and a replay would take three times as long.
    """
    if _repeated_share(record) < LEAST_REPEATED:
        return None
    chains, known, numbers = Chains(BLOCK_TOKENS, block_tokens=BLOCK_TOKENS), dict[bytes, int](), count()
    return tuple(
        chains.chain(
            hash_ids(a.blocks, a.input_tokens, known=known, numbers=numbers),
            prompt_tokens=a.input_tokens,
            output_tokens=a.output_tokens,
        )
        for a in record
    )


def _is_long_enough(record: Sequence[RecordedArrival]) -> bool:
    if len(record) < MIN_ARRIVALS:
        return False
    mean_e2e_s = sum(a.e2e_s for a in record) / len(record)
    return record[-1].arrival_s - record[0].arrival_s >= MIN_LATENCIES * mean_e2e_s


def _complete(recent: Sequence[RecordedArrival]) -> list[RecordedArrival]:
    """By arrival, without requests younger than the slowest latency: of these only the quick ones have finished.

    While a system fills up, latencies grow; with a lesser cut the long requests were missing, and with them the
    reason for classes.
    """
    slowest_s = max(a.e2e_s for a in recent)
    end_s = max(a.arrival_s + a.e2e_s for a in recent) - slowest_s
    return sorted((a for a in recent if a.arrival_s <= end_s), key=lambda a: a.arrival_s)


def _at_rate(alike: Sequence[RecordedArrival], changed: Changed, *, number: int) -> list[RecordedArrival]:
    """Poisson arrivals at the rate since the change, of requests drawn from these.

    Where content is told, of the latest of these in their order: whatever came again comes again, and no more.
    """
    rate = float(changed.demand.arrivals_per_s.sum())
    if rate <= 0.0:
        return []
    rng = np.random.default_rng(number)
    at_s = np.cumsum(rng.exponential(1.0 / rate, number))
    if tells_content(alike):
        return [replace(a, arrival_s=float(s)) for a, s in zip(alike[-number:], at_s, strict=False)]
    drawn = rng.integers(len(alike), size=number)
    return [replace(alike[int(i)], arrival_s=float(s)) for i, s in zip(drawn, at_s, strict=True)]


def _drawn_anew(known: Sequence[RecordedArrival], changed: Changed, *, number: int) -> list[RecordedArrival]:
    """Poisson arrivals at the rates since the change, each length bucket's requests drawn from those known of it.

    A bucket of which none is known gives requests of its middle length and of average output. The draw is the same
    for the same traffic. It tells no content.
    """
    rates = changed.demand.arrivals_per_s
    total = float(rates.sum())
    if total <= 0.0:
        return []
    rng = np.random.default_rng(number)
    by_bucket: dict[int, list[RecordedArrival]] = {}
    for arrival in known:
        by_bucket.setdefault(changed.buckets.index(arrival.input_tokens), []).append(arrival)
    output = round(sum(a.output_tokens for a in known) / len(known))
    at_s = np.cumsum(rng.exponential(1.0 / total, number))
    drawn: list[RecordedArrival] = []
    for bucket, arrival_s in zip(rng.choice(len(rates), size=number, p=rates / total), at_s, strict=True):
        some = by_bucket.get(int(bucket))
        if some is None:
            middle = round(float(changed.buckets.middle_tokens[bucket]))
            drawn.append(RecordedArrival(arrival_s=float(arrival_s), input_tokens=middle, output_tokens=output))
        else:
            one = some[int(rng.integers(len(some)))]
            drawn.append(replace(one, arrival_s=float(arrival_s), blocks=b""))
    return drawn
