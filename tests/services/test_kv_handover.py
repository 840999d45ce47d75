"""Hand-over with KV between two real vLLM engines, on the tiny model: one pair of engines for all tests."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from l4queue.models import SamplingParams
from workers.engine.base import EngineDied, EngineInfo, EngineRequest, FinishReason
from workers.engine.vllm.engine import VllmEngine
from workers.kv.store import new_ticket
from workers.tiny import build_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

MAX_MODEL_LEN = 8192
MAX_BATCHED_TOKENS = 512
LIMIT_BYTES = 24_000_000
NUM_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Token ids that no other seed gives."""
    return [int(token) for token in np.random.default_rng(seed).integers(10, 8000, num_tokens)]


@dataclass(slots=True, kw_only=True)
class Served:
    """A running engine and what has come out of it."""

    engine: VllmEngine
    info: EngineInfo
    core: psutil.Process
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    async def add(self, name: str, ids: list[int], max_tokens: int = NUM_TOKENS, *, kv: str = "") -> None:
        """Start a request."""
        self.tokens[name] = []
        self.ended.discard(name)
        request = EngineRequest(
            request_id=name, token_ids=ids, max_tokens=max_tokens, min_tokens=0, params=GREEDY, kv=kv
        )
        await self.engine.add(request)

    async def until(self, is_enough: Callable[[], bool]) -> None:
        """Collect outputs until that is so."""
        while not is_enough():
            for output in await self.engine.outputs():
                assert output.finish_reason in (None, FinishReason.LENGTH), output.error
                self.tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    self.ended.add(output.request_id)

    async def end(self, *names: str) -> list[list[int]]:
        """All tokens of these."""
        await self.until(lambda: self.ended >= set(names))
        return [self.tokens[name] for name in names]

    async def whole(self, ids: list[int], max_tokens: int = NUM_TOKENS) -> list[int]:
        """The output of a request that is never cut."""
        await self.add("whole", ids, max_tokens)
        return (await self.end("whole"))[0]

    async def begin_and_cut(self, name: str, ids: list[int], *, at: int, kv: str = "") -> tuple[list[int], str]:
        """Run a request to its `at`-th token or a little further and cut it; its tokens and its ticket."""
        await self.add(name, ids, kv=kv)
        await self.until(lambda: len(self.tokens[name]) >= at)
        cut = await self.engine.cut(name)
        assert cut is not None
        return self.tokens[name], cut.kv

    def counters(self) -> np.ndarray:
        """Loads, misses, bytes."""
        stats = self.engine.stats()
        return np.array([stats.num_kv_loads, stats.num_kv_misses, stats.kv_loaded_bytes])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two engines of one host."""

    source: Served
    target: Served
    directory: Path

    def segments(self) -> list[str]:
        """What lies in the directory, but for the locks."""
        return sorted({path.name for path in self.directory.iterdir()} - {"lock", "tenants"})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    """Each engine on a core of its own, if there are two."""
    folder = tmp_path_factory.mktemp("pair")
    model, directory = build_tiny_model(folder), folder / "kv"
    served: list[Served] = []
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    try:
        for number in range(2):
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(number % (os.cpu_count() or 1))
            before = set(psutil.Process().children())
            engine = VllmEngine(
                str(model),
                max_model_len=MAX_MODEL_LEN,
                max_running=16,
                dtype="float32",
                max_batched_tokens=MAX_BATCHED_TOKENS,
                kv_directory=directory,
                kv_handover_bytes=LIMIT_BYTES,
            )
            info = await engine.start()
            (core,) = [c for c in set(psutil.Process().children()) - before if "EngineCore" in c.name()]
            served.append(Served(engine=engine, info=info, core=core))
        yield Pair(source=served[0], target=served[1], directory=directory)
    finally:
        for each in served:
            await each.engine.stop()
        if binding is None:
            del os.environ["VLLM_CPU_OMP_THREADS_BIND"]
        else:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = binding


async def test_both_can_move_kv_and_say_how_much(pair: Pair) -> None:
    """2 · 4 layers · 2 heads · 64 · 4 bytes."""
    for each in (pair.source, pair.target):
        assert each.info.can_move_kv
        assert each.info.kv_bytes_per_token == 4096


async def test_speed_and_room_are_known_from_the_start_and_follow_each_move(pair: Pair) -> None:
    """Both engines see the segment of one as room that is taken, until the other has loaded it."""
    engines = (pair.source.engine, pair.target.engine)
    before = [engine.stats().kv_bytes_per_s for engine in engines]
    assert all(1e6 < speed < 1e12 for speed in before)
    assert [engine.stats().kv_budget_bytes for engine in engines] == [LIMIT_BYTES] * 2
    assert [engine.kv_room_bytes() for engine in engines] == [LIMIT_BYTES] * 2

    ids = prompt(30, 2000)
    output, kv = await pair.source.begin_and_cut("cut", ids, at=3)
    size = (pair.directory / f"{kv}.kv").stat().st_size
    assert [engine.kv_room_bytes() for engine in engines] == [LIMIT_BYTES - size] * 2
    await pair.target.add("cut", ids + output, NUM_TOKENS - len(output), kv=kv)
    await pair.target.end("cut")
    assert [engine.kv_room_bytes() for engine in engines] == [LIMIT_BYTES] * 2
    for each in (pair.source, pair.target):
        await each.whole(prompt(31, 20))  # what was measured comes with a step
    assert all(engine.stats().kv_bytes_per_s != speed for engine, speed in zip(engines, before, strict=True))


@pytest.mark.parametrize("length", [5, 127, 128, 129, 700, 3000])
async def test_a_request_goes_on_elsewhere_as_if_never_cut(pair: Pair, length: int) -> None:
    """Around a block's end, and beyond one step's budget; the target prefills next to nothing."""
    ids = prompt(length, length)
    whole = await pair.source.whole(ids)
    assert len(set(whole)) > 10
    before = pair.target.counters()
    pair.target.engine.step_records()

    output, kv = await pair.source.begin_and_cut("cut", ids, at=7)
    assert kv
    assert pair.segments() == [f"{kv}.kv"]
    await pair.target.add("cut", ids + output, NUM_TOKENS - len(output), kv=kv)
    assert output + (await pair.target.end("cut"))[0] == whole

    loads, misses, num_bytes = pair.target.counters() - before
    assert (loads, misses) == (1, 0)
    assert num_bytes >= (length + len(output) - 1) * pair.target.info.kv_bytes_per_token
    assert sum(record.prefill_tokens for record in pair.target.engine.step_records()) <= 2
    assert pair.segments() == []


async def test_many_at_once_to_and_fro_beside_others_that_stay(pair: Pair) -> None:
    """Nobody's tokens change: those that move twice, those that the engines go on with."""
    source, target = pair.source, pair.target
    prompts = {f"moves-{i}": prompt(100 + i, int(n)) for i, n in enumerate(np.geomspace(20, 2000, 5))}
    stays = {f"stays-{i}": prompt(200 + i, 300) for i in range(2)}
    expected = {name: await source.whole(ids) for name, ids in prompts.items()}
    expected |= {name: await source.whole(ids, 400) for name, ids in stays.items()}
    before = target.counters() + source.counters()

    for engine, name in zip((source, target), stays, strict=True):
        await engine.add(name, stays[name], 400)
    for name, ids in prompts.items():
        await source.add(name, ids)
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    for here, there, at in ((source, target, 4), (target, source, 18)):
        for number, (name, ids) in enumerate(prompts.items()):

            def is_there(name: str = name, at: int = at + number, here: Served = here) -> bool:
                return len(outputs[name]) + len(here.tokens[name]) >= at

            await here.until(is_there)
            cut = await here.engine.cut(name)
            assert cut is not None
            outputs[name] += here.tokens.pop(name)
            await there.add(name, ids + outputs[name], NUM_TOKENS - len(outputs[name]), kv=cut.kv)
    await source.end(*prompts)
    for name in prompts:
        assert outputs[name] + source.tokens[name] == expected[name], name
    for engine, name in zip((source, target), stays, strict=True):
        assert (await engine.end(name))[0] == expected[name]
    loads, misses, _ = target.counters() + source.counters() - before
    assert (loads, misses) == (10, 0)


@pytest.mark.parametrize("num_lost", [1, 6])
async def test_kv_serves_any_prefix_of_what_was_computed(pair: Pair, num_lost: int) -> None:
    """The last tokens were not committed: they are computed again."""
    ids = prompt(40 + num_lost, 250)
    whole = await pair.source.whole(ids)
    output, kv = await pair.source.begin_and_cut("cut", ids, at=10)
    before = pair.target.counters()
    kept = output[:-num_lost]
    await pair.target.add("cut", ids + kept, NUM_TOKENS - len(kept), kv=kv)
    assert kept + (await pair.target.end("cut"))[0] == whole
    assert (pair.target.counters() - before)[0] == 1


async def test_an_old_ticket_spares_what_it_can(pair: Pair) -> None:
    """More has been generated since."""
    ids = prompt(50, 400)
    whole = await pair.source.whole(ids)
    _, kv = await pair.source.begin_and_cut("cut", ids, at=3)
    before = pair.target.counters()
    await pair.target.add("cut", ids + whole[:30], NUM_TOKENS - 30, kv=kv)
    assert whole[:30] + (await pair.target.end("cut"))[0] == whole
    assert list(pair.target.counters() - before)[:2] == [1, 0]


def flip(path: Path) -> None:
    """One bit of the KV that lies in the first block of a layer."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


FAULTS: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut short": lambda path: os.truncate(path, 70_000),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "another's": lambda path: path.write_bytes(OTHER[0]),
}
OTHER: list[bytes] = []


@pytest.mark.parametrize("fault", FAULTS)
async def test_whatever_is_wrong_with_a_segment_the_request_is_prefilled(pair: Pair, fault: str) -> None:
    """The output is the same, the miss is counted, a neighbour hears nothing of it."""
    seed = 60 + list(FAULTS).index(fault)
    ids, other = prompt(seed, 400), prompt(seed + 20, 50)
    whole, neighbour = await pair.source.whole(ids), await pair.source.whole(other)
    if not OTHER:
        _, kv = await pair.source.begin_and_cut("other", prompt(99, 400), at=2)
        path = pair.directory / f"{kv}.kv"
        OTHER.append(path.read_bytes())
        path.unlink()
    output, kv = await pair.source.begin_and_cut("cut", ids, at=5)
    FAULTS[fault](pair.directory / f"{kv}.kv")
    before = pair.target.counters()

    await pair.target.add("neighbour", other)
    await pair.target.add("cut", ids + output, NUM_TOKENS - len(output), kv=kv)
    rest, beside = await pair.target.end("cut", "neighbour")
    assert (output + rest, beside) == (whole, neighbour)
    assert list(pair.target.counters() - before) == [0, 1, 0]


@pytest.mark.parametrize(
    "ticket", ["../../../etc/passwd", "emulated-10-10-00000000", new_ticket()], ids=["path", "emulated", "unknown"]
)
async def test_a_foreign_ticket_is_prefilled(pair: Pair, ticket: str) -> None:
    """Another host's, another engine's, nonsense."""
    ids = prompt(70, 30)
    before = pair.target.counters()
    await pair.target.add("foreign", ids, kv=ticket)
    assert (await pair.target.end("foreign"))[0] == await pair.source.whole(ids)
    assert list(pair.target.counters() - before) == [0, 1, 0]


async def test_what_is_too_large_or_does_not_run_has_no_ticket(pair: Pair) -> None:
    """Cut all the same; and what has ended is none of `cut`'s."""
    ids = prompt(80, 6000)
    whole = await pair.source.whole(ids)
    output, kv = await pair.source.begin_and_cut("large", ids, at=3)
    assert kv == ""
    await pair.target.add("large", ids + output, NUM_TOKENS - len(output))
    assert output + (await pair.target.end("large"))[0] == whole
    assert await pair.source.engine.cut("whole") is None
    assert await pair.source.engine.cut("unknown") is None
    await pair.source.add("new", prompt(81, 20))
    cut = await pair.source.engine.cut("new")
    assert cut is not None
    assert cut.kv == ""


async def test_aborted_at_any_point_of_its_way_nothing_is_left(pair: Pair) -> None:
    """While it loads, while it waits to load; blocks are free again, the engine serves on."""
    ids = prompt(90, 2000)
    for turns in (0, 1, 3, 10, 30):
        output, kv = await pair.source.begin_and_cut("cut", ids, at=2)
        await pair.target.add("cut", ids + output, kv=kv)
        for _ in range(turns):
            await asyncio.sleep(0)
        await pair.target.engine.abort(["cut"])
    assert (await pair.target.whole(prompt(91, 100))) == await pair.source.whole(prompt(91, 100))
    assert pair.target.engine.stats().kv_used_tokens == 0


async def test_a_source_that_is_killed_in_the_middle_of_cuts_costs_only_the_kv(pair: Pair) -> None:
    """The last test: it ends the source. What it had published is used, the rest is prefilled."""
    prompts = {f"cut-{i}": prompt(300 + i, 1000) for i in range(4)}
    expected = {name: await pair.target.whole(ids) for name, ids in prompts.items()}
    for name, ids in prompts.items():
        await pair.source.add(name, ids)
    await pair.source.until(lambda: all(len(pair.source.tokens[name]) >= 3 for name in prompts))

    async def kill() -> None:
        for process in [*pair.source.core.children(recursive=True), pair.source.core]:
            process.send_signal(signal.SIGKILL)

    async def cut(name: str) -> str:
        try:
            done = await pair.source.engine.cut(name)
        except EngineDied:
            return ""
        return done.kv if done is not None else ""

    steps: list[Awaitable[str | None]] = [*(cut(name) for name in prompts)]
    steps.insert(2, kill())
    found = await asyncio.gather(*steps)
    tickets = dict(zip(prompts, [found[0], found[1], *found[3:]], strict=True))
    for name, ids in prompts.items():
        output = pair.source.tokens[name]
        await pair.target.add(name, ids + output, NUM_TOKENS - len(output), kv=tickets[name] or new_ticket())
    for name, rest in zip(prompts, await pair.target.end(*prompts), strict=True):
        assert pair.source.tokens[name] + rest == expected[name]
    with pytest.raises(EngineDied):
        await pair.source.engine.cut("cut-0")
