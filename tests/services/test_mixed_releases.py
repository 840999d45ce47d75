"""An earlier release and today's serve together on one Redis: workers of both, under a dispatcher of either."""

from __future__ import annotations

import asyncio
import io
import json
import random
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from l4queue import AsyncClient, Settings
from l4queue.models import Plan, RequestState, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from tests.chaos.wishes import expected
from tests.conftest import SEED
from tests.services.processes import Processes, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

RELEASE = "913e1dbc96e527d064822c669e4af38c61a5620e"
"""The commit whose wire format is fixed: docs/compatibility.md."""
ROOT = Path(__file__).parents[2]
WORKERS = ("old-0", "old-1", "new-0", "new-1")
STAGES = (
    StagePlan(low_tokens=0, high_tokens=120, num_workers=1, worker_ids=("old-0",)),
    StagePlan(low_tokens=120, high_tokens=400, num_workers=1, worker_ids=("new-0",)),
    StagePlan(low_tokens=400, high_tokens=None, num_workers=2, worker_ids=("old-1", "new-1")),
)
OPEN = 40
MOST_REQUESTS = 600

_SHOW = """
from l4queue.config import load_settings
from {package}.overview import read_overview
from l4queue.protocol.{module} import {name}
settings = load_settings()
print(sorted(load.worker_id for load in read_overview({name}(settings.redis_url), settings.namespace).workers))
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the earlier release, from this checkout's history."""
    found = subprocess.run(("git", "archive", RELEASE), cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        pytest.fail(
            f"commit {RELEASE} is not in this checkout, so nothing says whether releases mix: take a clone with "
            f"its history (git fetch --unshallow) and not an archive. git: {found.stderr.decode().strip()}"
        )
    tree = tmp_path_factory.mktemp("release")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(tree, filter="data")
    return tree


class MixedFleet:
    """Processes of both releases under one namespace; a name says of which: `old-` or `new-`."""

    def __init__(self, folder: Path, release: Path, url: str, namespace: str) -> None:
        common = {"redis_url": url, "namespace": namespace, "engine": "emulated", "model": "tiny", "lease_s": 5.0}
        common |= {"emulated_kv_bytes_per_s": 1e9}
        self.settings = Settings(**common, _env_file=None)  # type: ignore[arg-type,call-arg]
        self.processes = Processes(folder, **common)
        self.trees = {"old": release, "new": ROOT}
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, **settings: object) -> None:
        """Start `python <arguments>` from the tree that the name says."""
        self.processes.environment["PYTHONPATH"] = str(self.trees[name.partition("-")[0]])
        self.started[name] = self.processes.start(name, *arguments, **settings)

    def run(self, tree: str, code: str) -> str:
        """Run a line of Python in that tree; what it prints."""
        self.processes.environment["PYTHONPATH"] = str(self.trees[tree])
        return self.processes.run("-c", code, timeout_s=300)

    def check(self) -> None:
        """Nobody has ended."""
        for name, process in self.started.items():
            assert process.poll() is None, f"{name} ended:\n{self.processes.log(name)[-4000:]}"


@pytest.fixture
def fleet(tmp_path: Path, release: Path, redis_url: str, namespace: str) -> Iterator[MixedFleet]:
    """Nothing runs yet."""
    opened = MixedFleet(tmp_path, release, redis_url, namespace)
    yield opened
    opened.processes.close()


async def _one(client: AsyncClient, number: int, rng: random.Random) -> str:
    """Enqueue, read the stream, compare with one undisturbed run; the id."""
    length = rng.choice((rng.randint(60, 110), rng.randint(300, 390), rng.randint(300, 390)))
    prompt, max_tokens = f"{number}:".ljust(length, "x"), rng.randint(60, 200)
    handle = await client.enqueue(token_ids=list(prompt.encode()), max_tokens=max_tokens, ignore_eos=True)
    tokens: list[int] = []
    async for chunk in handle.stream():
        tokens += chunk.token_ids
    assert tuple(tokens) == expected(prompt, max_tokens)
    return handle.id


@pytest.mark.parametrize("dispatcher", ["old", "new"])
async def test_workers_of_two_releases_serve_together(
    fleet: MixedFleet, executor: Executor, dispatcher: str
) -> None:
    """Under load, over three stages, with hand-over of KV: all is done as by one release, and nobody ends."""
    keys = Keys(fleet.settings.namespace)
    reads, calls = Reads(keys), Calls(keys)
    body = plan_to_json(Plan(version=1, stages=STAGES, reason="both releases in every move"))
    assert executor.run(calls.publish(expected_version=0, version=1, body=body)) is Verdict.OK
    fleet.start(f"{dispatcher}-d", "-m", "dispatcher")
    for name in WORKERS:
        fleet.start(name, "-m", "workers", worker_id=name)

    def is_complete() -> bool:
        fleet.check()
        return {name.rpartition(":")[0] for name, _ in executor.run(reads.incarnations())} == set(WORKERS)

    await asyncio.to_thread(until, is_complete, "all four workers serve", timeout_s=300)
    rng, ids = random.Random(SEED), list[str]()
    async with AsyncClient(settings=fleet.settings) as client:
        while len(ids) < MOST_REQUESTS:
            ids += await asyncio.gather(*(_one(client, len(ids) + i, rng) for i in range(OPEN)))
            fleet.check()
            records = [await (await client.get(request_id)).status() for request_id in ids]
            ledgers = executor.run_many([reads.ledger(request_id) for request_id in ids])
            moved = Counter(_ways(ledgers))
            if {"old>new", "new>old"} <= moved.keys() and {r.worker for r in records} == set(WORKERS):
                break
        overview = await client.overview()

    assert {record.state for record in records} == {RequestState.DONE}
    assert [record.request_id for record in records if record.crashes] == []
    assert {record.worker for record in records} == set(WORKERS)
    print(len(ids), moved)
    assert {"old>new", "new>old"} <= moved.keys(), moved
    assert {load.worker_id for load in overview.workers} == set(WORKERS)
    assert overview.counts["live"] == 0
    assert overview.counts.get("dead", 0) == overview.counts.get("failed", 0) == 0
    planners = {"old": "dispatcher.replan", "new": "dispatcher.planner.rounds"}
    overviews = {
        "old": {"package": "l4queue.protocol", "module": "door", "name": "Door"},
        "new": {"package": "l4queue.observe", "module": "executor", "name": "Executor"},
    }
    for tree, planner in planners.items():  # each release's planner and overview read what both wrote
        code = f"import asyncio; from l4queue.config import load_settings; from {planner} import replan_once; "
        planned = fleet.run(tree, code + "print('planned:', asyncio.run(replan_once(load_settings())))")
        assert "planned:" in planned, planned
        shown = fleet.run(tree, _SHOW.format(**overviews[tree]))
        assert all(worker in shown for worker in WORKERS), shown
    fleet.check()


def _ways(ledgers: list[list[str]]) -> Iterator[str]:
    """Of each hand-over, from which release's worker to which other's."""
    for ledger in ledgers:
        for line in map(json.loads, ledger):
            if line["what"] in ("hand-over", "escape", "steal"):
                source, target = line["worker"][:3], line["to"].removeprefix("@")[:3]
                yield f"{source}>{target}"
