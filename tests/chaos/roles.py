"""What the processes of a deployment under chaos do: the product's own loops behind a door with faults."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dispatcher.host as dispatcher_host
import dispatcher.planner.rounds as replanning
import dispatcher.routing.service as dispatcher_service
import l4queue.protocol.executor as executor_module
import workers.loop.context as worker_context
from dispatcher.routing.service import Dispatcher
from l4queue import AsyncClient, Settings
from l4queue.client import read_marks
from l4queue.errors import L4QueueError, RequestCancelled, RequestExpired, RequestTooLong, UnknownRequest
from l4queue.models import Plan, StagePlan
from l4queue.plan_json import plan_from_json, plan_to_json
from l4queue.protocol import upkeep as upkeep_module
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from l4queue.protocol.upkeep import Upkeep
from tests.chaos.faults import Faults, FaultyBlockingExecutor, FaultyExecutor, Fuse, Kind, Point, Side
from tests.chaos.wishes import MAX_LEN, Wish, expected, wish
from tests.services.pipeline import COST, ByteTokenizer
from workers.engine.emulated.engine import EmulatedEngine
from workers.loop import lease_thread
from workers.loop.text import no_text
from workers.loop.worker import Worker
from workers.telemetry.observer import NullObserver

__all__ = ("ROLES", "fuse_from", "fuse_to", "settings_of")

# each request in a batch slows the others, a prefill costs next to nothing: moving pays at once
CROWDED = replace(COST, alpha_ms=4.0, beta_ms=4.0, pi_ms=0.0001, kv_capacity_tokens=20_000, max_num_seqs=8)
_DEADLINE_S = 300.0
_PACK_AGE_MS = 500  # outputs are packed while clients read them


def fuse_to(fuse: Fuse) -> list[Any]:
    """A fuse as JSON."""
    point = fuse.point
    return [point.role, point.script, point.side.value, point.kind.value, fuse.nth]


def fuse_from(row: Sequence[Any]) -> Fuse:
    """A fuse from JSON."""
    return Fuse(Point(row[0], row[1], Side(row[2]), Kind(row[3])), row[4])


def settings_of(job: dict[str, Any]) -> Settings:
    """Short leases, small batches: everything happens often."""
    given = {"lease_s": 1.0, "max_running": 6, "drain_s": 10.0, "max_model_len": MAX_LEN, "max_crashes": 1000}
    given |= {"emit_interval_ms": 40.0, "dispatcher_claim_idle_s": 0.5, "result_ttl_s": 3600.0}
    return Settings(**(given | job["settings"]))


def _begin(job: dict[str, Any]) -> Settings:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(name)s %(message)s")
    FaultyExecutor.faults = Faults([fuse_from(row) for row in job.get("fuses", ())], Path(job["journal"]))
    modules: tuple[Any, ...] = (worker_context, executor_module, replanning)  # clients import theirs when made
    for module in modules:
        module.AsyncExecutor = FaultyExecutor
    keeping: Any = lease_thread
    keeping.Executor = FaultyBlockingExecutor
    marks: Any = read_marks
    marks._MOST = 1  # every result that is read is told at once
    upkeep_module.PACK_AGE_MS = _PACK_AGE_MS
    return settings_of(job)


def _on_term(stop: Callable[[], None]) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


# workers ------------------------------------------------------------------------------------------
def run_worker(job: dict[str, Any]) -> None:
    """A GPU worker with an emulated engine."""
    settings = _begin(job)

    async def serve() -> None:
        worker = Worker(
            settings=settings,
            engine=EmulatedEngine(CROWDED, speed=job.get("speed", 1.0), max_model_len=MAX_LEN),
            observer=NullObserver(),
            worker_id=job["worker_id"],
            text=no_text,
            cost=CROWDED,
        )
        _on_term(worker.request_stop)
        await worker.run()

    asyncio.run(serve())


# dispatchers --------------------------------------------------------------------------------------
def run_dispatcher(job: dict[str, Any]) -> None:
    """A dispatcher with its upkeep; the slow part of that comes often."""
    settings = _begin(job)
    host: Any = dispatcher_host
    host._SLOW_ROUND_S = 0.5
    service_module: Any = dispatcher_service
    service_module._MAX_DELIVERIES = 1000  # as `max_crashes`: whoever dies here is never the request's fault

    async def serve() -> None:
        executor, tokenizer = FaultyExecutor(settings.redis_url, retry_s=None), ByteTokenizer()
        tokenizer.max_model_len = MAX_LEN
        service: Any = Dispatcher(settings=settings, executor=executor, tokenizer=tokenizer, name=job["name"])  # type: ignore[arg-type]
        stopping = asyncio.Event()
        _on_term(stopping.set)
        routing = asyncio.create_task(service.run())
        upkeep = Upkeep(settings=settings, executor=executor)
        keeping = asyncio.create_task(host.keep_up(service, upkeep, executor, stopping))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({routing, keeping, stop}, return_when=asyncio.FIRST_COMPLETED)
        service.request_stop()
        stopping.set()
        await asyncio.gather(routing, keeping)
        await executor.close()

    asyncio.run(serve())


# planners -----------------------------------------------------------------------------------------
def plan_of(version: int, rng: random.Random, worker_ids: Sequence[str]) -> Plan:
    """Two or three stages with boundaries and workers at random: plans that follow each other fast."""
    highs: list[int] = sorted(rng.sample((40, 60, 90, 140), rng.choice((1, 2, 2))))
    ids = list(worker_ids)
    rng.shuffle(ids)
    stages = []
    for index, (low, high) in enumerate(zip((0, *highs), (*highs, None), strict=True)):
        mine = tuple(ids[index :: len(highs) + 1])
        stages.append(StagePlan(low_tokens=low, high_tokens=high, num_workers=len(mine), worker_ids=mine))
    return Plan(version=version, stages=tuple(stages), reason="chaos")


def run_planner(job: dict[str, Any]) -> None:
    """Publishes another plan each period, and takes what waits along."""
    settings = _begin(job)
    rng = random.Random(f"{job['seed']}-{os.getpid()}")
    keys = Keys(settings.namespace)
    calls, reads = Calls(keys), Reads(keys)

    async def serve() -> None:
        stopping = asyncio.Event()
        _on_term(stopping.set)
        executor = FaultyExecutor(settings.redis_url, retry_s=None)
        upkeep = Upkeep(settings=settings, executor=executor)
        while not stopping.is_set():
            version, body = await executor.run(reads.plan())
            if body is not None:  # a planner that died before this left what waits where it was
                await upkeep.reroute(plan_from_json(body))
            plan = plan_of(version + 1, rng, job["worker_ids"])
            call = calls.publish(expected_version=version, version=plan.version, body=plan_to_json(plan))
            if await executor.run(call) is Verdict.OK:
                await upkeep.reroute(plan)
            try:
                async with asyncio.timeout(job["period_s"] * rng.uniform(0.5, 1.5)):
                    await stopping.wait()
            except TimeoutError:
                continue
        await executor.close()

    asyncio.run(serve())


def run_replanner(job: dict[str, Any]) -> None:
    """The real planner, once in each period."""
    settings = _begin(job)

    async def serve() -> None:
        stopping = asyncio.Event()
        _on_term(stopping.set)
        while not stopping.is_set():
            await replanning.replan_once(settings)
            try:
                async with asyncio.timeout(settings.replan_interval_s):
                    await stopping.wait()
            except TimeoutError:
                continue

    asyncio.run(serve())


# clients ------------------------------------------------------------------------------------------
def run_client(job: dict[str, Any]) -> None:
    """Makes wishes first, first + step, ... in bursts, follows each stream, writes down what ended and how.

    Killed, it begins again: the idempotency key makes a repeated wish the same request. On SIGTERM it makes no
    more wishes, and ends when all have ended.
    """
    asyncio.run(_wish_on(_begin(job), job))


async def _wish_on(settings: Settings, job: dict[str, Any]) -> None:
    endings, made = Path(job["endings"]), Path(job["made"])
    over = {json.loads(line)["n"] for line in endings.read_text().splitlines()} if endings.exists() else set()
    n = int(made.read_text()) if made.exists() else job["first"]
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    _on_term(stopping.set)
    gate = asyncio.Semaphore(job["most"])
    async with AsyncClient(settings=settings) as client, asyncio.TaskGroup() as group:

        async def follow(one: Wish) -> None:
            try:
                _append(endings, await _follow(client, one))
            finally:
                gate.release()

        for old in range(job["first"], n, job["step"]):
            if old not in over:
                await gate.acquire()
                group.create_task(follow(wish(job["seed"], old)))
        while not stopping.is_set():
            await gate.acquire()
            group.create_task(follow(wish(job["seed"], n)))
            n += job["step"]
            _replace(made, str(n))
            is_calm = int(loop.time() / job["burst_s"]) % 2 == 0
            await asyncio.sleep(job["pause_s"] * (20 if is_calm else 1))


async def _follow(client: AsyncClient, one: Wish) -> dict[str, Any]:
    """Enqueue and read to the end; what was read, held against what it must be."""
    handle = await client.enqueue(one.prompt, **one.options())
    right, got, outcome, wrong = expected(one.prompt, one.max_tokens), list[int](), "done", ""
    if one.cancel_after == 0:
        await handle.cancel()
    try:
        has_left, is_over = one.n % 4 != 0, False
        while not is_over:
            async for chunk in handle.stream(after=len(got), timeout=_DEADLINE_S):
                got += chunk.token_ids
                if chunk.offset != len(got) or tuple(got) != right[: len(got)]:
                    wrong = wrong or f"stream at {chunk.offset}: got {got[-5:]}"
                if one.cancel_after is not None and len(got) >= one.cancel_after:
                    await handle.cancel()
                if not has_left:
                    break
            else:
                is_over = True
            if not has_left:  # it comes back for the rest: at once, or after others were told of
                has_left = True
                await asyncio.sleep(one.n % 8 / 8)
        result = await handle.result(timeout=_DEADLINE_S)
        if result.token_ids != right:
            wrong = wrong or f"result: got {result.token_ids[-5:]}"
    except RequestCancelled:
        outcome = "cancelled"
    except RequestExpired:
        outcome = "expired"
    except RequestTooLong:
        outcome = "failed"
    except (L4QueueError, UnknownRequest) as error:
        outcome = f"{type(error).__name__}: {error}"
    return {"n": one.n, "id": handle.id, "outcome": outcome, "tokens": len(got), "wrong": wrong}


def _append(path: Path, facts: dict[str, Any]) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, json.dumps(facts).encode() + b"\n")
    os.close(handle)


def _replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


ROLES: dict[str, Callable[[dict[str, Any]], None]] = {
    "worker": run_worker,
    "dispatcher": run_dispatcher,
    "planner": run_planner,
    "replanner": run_replanner,
    "client": run_client,
}
