"""Rounds of `bench serve`: the same arrivals under each routing in turn, on the same running engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from l4queue.cli.bench.cpu_time import fixed_work_ms
from l4queue.errors import ServiceUnavailable
from l4queue.models import Plan, RequestState, Routing, StagePlan
from l4queue.observe.overview import cost_in_force
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.ledger import MoveCounter
from l4queue.sim.results import Measured, SimResult, summarize
from l4queue.sim.runner import RunConfig
from l4queue.sim.tuning import tune_two_pool

if TYPE_CHECKING:
    from l4queue.client import AsyncClient, AsyncHandle, RequestStatus
    from l4queue.config import Settings
    from l4queue.observe.overview import Overview
    from l4queue.sim.traces.trace import Trace

__all__ = ("Round", "Rounds", "Sample", "pooled")

_SAMPLE_S = 0.5  # between two samples of the workers
_BATCH = 256  # records read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The deployment at one moment of a round: seconds since its first arrival; requests by worker id."""

    at_s: float
    running: dict[str, int]
    waiting: int
    plan: Plan
    num_moves: int
    fixed_work_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One routing under the whole trace.

    `late_s` is by how much the load generator was late at worst, `cpu_cores` how many cores each process kept
    busy on average: where that is near one, the process held up what it was to measure. `busy_share` is
    by worker the share of the samples, while counted requests arrived, in which its engine had requests.
    `fixed_work_ms` is the mean CPU time of the same small work then: how slow the machine itself was.
    """

    policy: str
    number: int
    measured: Measured
    result: SimResult
    samples: tuple[Sample, ...]
    late_s: float
    cpu_cores: dict[str, float]
    busy_share: dict[str, float]
    fixed_work_ms: float


@dataclass(kw_only=True)
class Rounds:
    """Drives a deployment that is running. `warmup_s` of the arrivals are served but not counted.

    `traces` are the arrivals of each round, and last those of the rehearsal. Within a round they are the same for
    every policy, but for the tokens of the prompts: what one run left in the engines' prefix caches must not make
    the next one faster. `cpu_s` tells the CPU time of each process so far, s; `on_progress` how many requests of
    how many are done.
    """

    client: AsyncClient
    settings: Settings
    traces: Sequence[Trace]
    warmup_s: float
    seed: int
    vocabulary: int = 2000
    on_progress: Callable[[int, int], None] = lambda _, __: None
    cpu_s: Callable[[], dict[str, float]] = dict
    _l4: Plan | None = field(default=None, init=False)
    _executor: AsyncExecutor | None = field(default=None, init=False)
    _num_runs: int = field(default=0, init=False)

    async def rehearse(self) -> None:
        """Let the planner see such traffic once under l4. (two-pool is tuned on each round itself.)"""
        async with self._connected():
            await self._serve(Routing.L4, len(self.traces) - 1)

    async def run(self, policies: Sequence[str], *, number: int) -> AsyncIterator[Round]:
        """One round: every policy once, in an order that turns by one from round to round."""
        async with self._connected():
            turned = [policies[(number + i) % len(policies)] for i in range(len(policies))]
            for policy in turned:
                yield await self._serve(policy, number)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        self._executor = AsyncExecutor(self.settings.redis_url)
        try:
            yield
        finally:
            await self._executor.close()

    async def _serve(self, policy: str, number: int) -> Round:
        trace = self.traces[number]
        await self._switch(Routing(policy), trace)
        before, cpu_before, began_s = await self.client.overview(), self.cpu_s(), time.monotonic()
        async with self._sampling() as samples:
            handles, late_s = await self._send(trace)
            done = 0
            async for _ in self.client.as_completed(handles):
                done += 1
                self.on_progress(done, len(trace))
        after, cpu_after, took_s = await self.client.overview(), self.cpu_s(), time.monotonic() - began_s
        if policy == Routing.L4:
            self._l4 = after.plan
        records = await _records(handles)
        counted = [r for r, at in zip(records, trace.arrival_s, strict=True) if at >= self.warmup_s]
        failed = [r for r in counted if r.state is not RequestState.DONE]
        if failed:
            raise ServiceUnavailable(f"{len(failed)} requests did not end as done, the first: {failed[0].error}")
        measured = _measured(counted, began_ms=before.now_ms)
        until_s = float(trace.arrival_s[-1])
        counted_samples = [sample for sample in samples if self.warmup_s <= sample.at_s <= until_s] or samples
        result = summarize(
            policy,
            measured,
            num_handovers=_gained(before, after, MoveCounter.HANDOVERS),
            num_steals=_gained(before, after, MoveCounter.STEALS_WAITING)
            + _gained(before, after, MoveCounter.STEALS_RUNNING),
            num_preemptions=_num_preemptions(after) - _num_preemptions(before),
        )
        return Round(
            policy=policy,
            number=number,
            measured=measured,
            result=result,
            samples=tuple(samples),
            late_s=late_s,
            cpu_cores={name: (used - cpu_before.get(name, 0.0)) / took_s for name, used in cpu_after.items()},
            busy_share=_busy_share(counted_samples),
            fixed_work_ms=float(np.mean([sample.fixed_work_ms for sample in counted_samples])),
        )

    async def _send(self, trace: Trace) -> tuple[list[AsyncHandle], float]:
        """Open loop: each request leaves at its time, whatever became of the others."""
        self._num_runs += 1
        rng = np.random.default_rng([self.seed, self._num_runs])
        start_s, late_s = time.monotonic(), 0.0
        sending: list[asyncio.Task[AsyncHandle]] = []
        for length, at_s, output in zip(trace.input_tokens, trace.arrival_s, trace.output_tokens, strict=True):
            prompt = rng.integers(10, self.vocabulary, int(length)).tolist()  # now: all at once fill the memory
            wait_s = start_s + float(at_s) - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            late_s = max(late_s, -wait_s)
            enqueue = self.client.enqueue(
                token_ids=prompt, max_tokens=int(output), ignore_eos=True, temperature=0.0
            )
            sending.append(asyncio.create_task(enqueue))
        return list(await asyncio.gather(*sending)), late_s

    @asynccontextmanager
    async def _sampling(self) -> AsyncIterator[list[Sample]]:
        samples: list[Sample] = []
        start_s = time.monotonic()

        async def sample() -> None:
            while True:
                samples.append(_sample(await self.client.overview(), at_s=time.monotonic() - start_s))
                await asyncio.sleep(_SAMPLE_S)

        task = asyncio.create_task(sample())
        try:
            yield samples
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _switch(self, routing: Routing, trace: Trace) -> None:
        """Publish the plan of this routing; another planner that publishes meanwhile only makes us try again."""
        assert self._executor is not None
        calls = Calls(Keys(self.settings.namespace))
        for _ in range(20):
            overview = await self.client.overview()
            version = overview.plan.version
            plan = await asyncio.to_thread(self._plan, routing, overview, trace)
            plan = replace(plan, version=version + 1, routing=routing, reason=f"bench: {routing}")
            call = calls.publish(expected_version=version, version=version + 1, body=plan_to_json(plan))
            if await self._executor.run(call) is not Verdict.STALE:
                return
        raise ServiceUnavailable("somebody else keeps publishing plans here; stop other planners or benchmarks")

    def _plan(self, routing: Routing, overview: Overview, trace: Trace) -> Plan:
        """One stage, the tuned pools, or what the planner of l4 had at the end of its last run."""
        ids = tuple(sorted(worker.worker_id for worker in overview.workers))
        one = Plan(
            version=0,
            stages=(StagePlan(low_tokens=0, high_tokens=None, num_workers=len(ids), worker_ids=ids),),
            created_ms=overview.now_ms,
        )
        if routing is Routing.L4 and self._l4 is not None:
            served = {i for stage in self._l4.stages for i in stage.worker_ids}
            return self._l4 if served == set(ids) else one
        if routing is not Routing.TWO_POOL:
            return one
        setting = RunConfig(cost=cost_in_force(overview, self.settings), num_instances=len(ids))
        tuned = tune_two_pool(trace, setting)
        if not 0 < tuned.num_short < len(ids):
            return one
        short, long = ids[: tuned.num_short], ids[tuned.num_short :]
        edge = tuned.threshold_tokens
        pools = (
            StagePlan(low_tokens=0, high_tokens=edge, num_workers=len(short), worker_ids=short),
            StagePlan(low_tokens=edge, high_tokens=None, num_workers=len(long), worker_ids=long),
        )
        return replace(one, stages=pools)


async def _records(handles: Sequence[AsyncHandle]) -> list[RequestStatus]:
    """Few at a time: each look waits for a connection of its own."""
    found: list[RequestStatus] = []
    for first in range(0, len(handles), _BATCH):
        found += await asyncio.gather(*(handle.status() for handle in handles[first : first + _BATCH]))
    return found


def pooled(rounds: Sequence[Round]) -> tuple[SimResult, Measured]:
    """All rounds of one policy as one: figures over all their requests, moves added up."""
    parts = [r.measured for r in rounds]
    together = Measured(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in Measured.__slots__}
    )
    result = summarize(
        rounds[0].policy,
        together,
        num_handovers=sum(r.result.num_handovers for r in rounds),
        num_steals=sum(r.result.num_steals for r in rounds),
        num_preemptions=sum(r.result.num_preemptions for r in rounds),
    )
    seconds = sum(len(r.measured.e2e_s) / r.result.throughput_rps for r in rounds)
    fields: dict[str, Any] = {name: getattr(result, name) for name in SimResult.__slots__}
    return SimResult(**{**fields, "throughput_rps": len(together.e2e_s) / seconds}), together


def _measured(records: Sequence[RequestStatus], *, began_ms: int) -> Measured:
    """By the server's clock since the run began: from acceptance to the first token and to the stored outcome."""
    began_s = began_ms / 1000
    accepted = np.array([r.submitted_at_s - began_s for r in records], dtype=float)
    finish = np.array([(r.finished_at_s or 0) - began_s for r in records], dtype=float)
    first = np.array([(r.first_token_at_s or 0) - began_s for r in records], dtype=float)
    return Measured(
        arrival_s=accepted,
        finish_s=finish,
        e2e_s=finish - accepted,
        ttft_s=first - accepted,
        tpot_s=np.array([np.nan if r.tpot_s is None else r.tpot_s for r in records]),
        prompt_tokens=np.array([r.prompt_tokens or 0 for r in records], dtype=float),
        output_tokens=np.array([r.output_tokens for r in records], dtype=float),
    )


def _sample(overview: Overview, *, at_s: float) -> Sample:
    return Sample(
        at_s=at_s,
        running={load.worker_id: load.num_running for load in overview.workers},
        waiting=overview.inbox + sum(queue.num_requests for queue in overview.queues.values()),
        plan=overview.plan,
        num_moves=sum(overview.counts.get(name, 0) for name in MoveCounter),
        fixed_work_ms=fixed_work_ms(),
    )


def _busy_share(samples: Sequence[Sample]) -> dict[str, float]:
    workers = sorted({worker for sample in samples for worker in sample.running})
    return {w: sum(sample.running.get(w, 0) > 0 for sample in samples) / len(samples) for w in workers}


def _num_preemptions(overview: Overview) -> int:
    return sum(load.num_preemptions for load in overview.workers)


def _gained(before: Overview, after: Overview, name: str) -> int:
    return after.counts.get(name, 0) - before.counts.get(name, 0)
