"""One rule of admission: a live worker and a simulated engine that run the same are given the same budget."""

from __future__ import annotations

import ast
import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.config import Settings
from l4queue.cost.step import StepCost
from l4queue.models import WorkerLoad
from l4queue.policy.admission import AdmissionBudget
from l4queue.policy.output_lengths import OutputLengths
from l4queue.protocol.records import Grant, pack_ids
from l4queue.sim.engine.instance import Instance
from l4queue.sim.engine.request import SimRequest
from l4queue.sim.policies.pool import Pool
from l4queue.sim.policies.views import load_of
from workers.engine.base import EngineOutput
from workers.engine.emulated.engine import EmulatedEngine
from workers.loop.session import Session
from workers.loop.text import no_text
from workers.loop.worker import Worker
from workers.telemetry.observer import NullObserver

ROOT = Path(__file__).resolve().parents[2]
COST = StepCost(
    alpha_ms=7.0,
    beta_ms=0.02,
    gamma_ms=4e-5,
    pi_ms=0.017,
    psi_ms=2e-6,
    kv_capacity_tokens=100_000,
    max_batched_tokens=2048,
    max_num_seqs=8,
)
CALLERS = {
    "admission_budget": {"workers/loop/intake.py", "workers/loop/chooser.py", "l4queue/sim/policies/pool.py"},
    "still_awaited": {"workers/loop/intake.py", "l4queue/sim/policies/pool.py"},
    "first_watch": {"workers/loop/intake.py", "l4queue/sim/policies/l4.py"},
    "backlog_ms": {"workers/loop/report.py", "workers/loop/fleet_view.py", "l4queue/sim/wake.py"},
    "sample_siblings": {"workers/loop/mover.py", "l4queue/sim/policies/l4_escapes.py"},
    "request_work_ms": {"l4queue/policy/loads.py", "l4queue/policy/steal.py", "l4queue/sim/capacity.py"},
    "max_prefill_ms": {"l4queue/policy/admission.py"},
}


def _sources() -> dict[str, str]:
    """Files of the product that name any of these functions."""
    paths = [path for name in ("l4queue", "dispatcher", "workers") for path in (ROOT / name).rglob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in paths}
    return {path: text for path, text in texts.items() if any(name in text for name in CALLERS)}


def test_each_rule_has_one_home_and_is_called_by_the_worker_and_by_the_simulator() -> None:
    """A second home would be another definition, or a caller that is missing here."""
    calls, homes = defaultdict(set), defaultdict(list)
    for path, text in _sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLERS:
                calls[node.func.id].add(path)
            elif isinstance(node, ast.FunctionDef) and node.name in CALLERS:
                homes[node.name].append(path)
    assert calls == CALLERS
    assert {name: [path.split("/")[1] for path in paths] for name, paths in homes.items()} == {
        name: ["policy"] for name in CALLERS
    }


@pytest.fixture(scope="module")
def worker() -> Worker:
    """With an emulated engine that has said its limits; nothing is asked of Redis."""
    made = Worker(
        settings=Settings(max_running=COST.max_num_seqs),
        engine=EmulatedEngine(COST),
        observer=NullObserver(),
        worker_id="w",
        text=no_text,
        cost=COST,
    )

    async def info() -> None:
        made.profile.started(await made.context.engine.start())
        await made.context.engine.stop()
        await made.context.executor.close()

    asyncio.run(info())
    return made


def _live(worker: Worker, decoding: Sequence[int], prompts: Sequence[int]) -> tuple[AdmissionBudget, WorkerLoad]:
    """Budget and load of a worker with these lengths, the first ones past their first token."""
    for session in worker.sessions:
        worker.sessions.drop(session)
    for number, tokens in enumerate((*decoding, *prompts)):
        grant = Grant(
            request_id=str(number),
            epoch=1,
            body=json.dumps({"params": {"max_tokens": 100}}).encode(),
            packed_ids=pack_ids([5] * tokens),
            offset=0,
            prompt_tokens=tokens,
            crashes=0,
            score=0.0,
            submitted_ms=0,
            deadline_ms=None,
            stage="0",
        )
        session = Session(grant, incarnation="w:1", stage=0, range_text="0–∞", started_s=0.0, make_text=no_text)
        worker.sessions.add(session, watch_tokens=None)
        if number < len(decoding):
            session.feed(EngineOutput(request_id=session.engine_id, token_ids=(7,)))
    return worker._intake.room(), worker._report.load()


def _simulated(
    decoding: Sequence[int], prompts: Sequence[int], outputs: OutputLengths
) -> tuple[AdmissionBudget, WorkerLoad]:
    """The same of a simulated engine: the first ones are through their prefill, the others have just come."""
    engine = Instance(0, cost=COST)
    requests = [
        SimRequest(i, 0.0, prompt_tokens=n, output_tokens=100) for i, n in enumerate((*decoding, *prompts))
    ]
    for request in requests[: len(decoding)]:
        engine.push(request)
    if decoding:
        engine.start_segment(0.0)
        engine.finish_segment()
    for request in requests[len(decoding) :]:
        engine.push(request)
    pool = Pool([engine], score=lambda r: r.arrival_s, remaining_tokens=lambda: outputs.mean_tokens)
    return pool.budget(engine), load_of(engine)


@settings(max_examples=60)
@given(
    decoding=st.lists(st.integers(1, 200), max_size=4),
    prompts=st.lists(st.integers(1, 3000), max_size=5),
    outputs=st.lists(st.integers(1, 2000), max_size=3),
)
def test_worker_and_simulated_engine_have_the_same_load_and_budget(
    worker: Worker, decoding: list[int], prompts: list[int], outputs: list[int]
) -> None:
    """But for the cache that decodes hold: the sessions here were never given to the emulated engine."""
    worker.fleet_view.outputs = OutputLengths()
    worker.fleet_view.outputs.add(outputs)

    live, load = _live(worker, decoding, prompts)
    simulated, simulated_load = _simulated(decoding, prompts, worker.fleet_view.outputs)

    if decoding:
        live, simulated = replace(live, kv_tokens=0), replace(simulated, kv_tokens=0)
    assert live == simulated
    for name in ("num_running", "context_tokens", "pending_prefill_tokens", "kv_capacity_tokens", "max_running"):
        assert getattr(load, name) == getattr(simulated_load, name)
