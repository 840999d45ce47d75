"""The emulated engine behind the seam: its clock, its refusals, its end."""

from __future__ import annotations

import asyncio
import selectors
from array import array
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from l4queue.cost.step import BatchShape, StepCost
from l4queue.models import SamplingParams
from l4queue.protocol.records import id_array, pack_ids
from workers.engine.base import EngineDied, EngineOutput, EngineRequest, FinishReason
from workers.engine.emulated.engine import EmulatedEngine
from workers.engine.emulated.scheduler import next_token

COST = StepCost(
    alpha_ms=5.0,
    beta_ms=0.5,
    gamma_ms=0.01,
    pi_ms=0.1,
    psi_ms=0.001,
    kv_capacity_tokens=1600,
    max_batched_tokens=128,
    max_num_seqs=6,
)


class VirtualSelector(selectors.SelectSelector):
    """Waits for nothing: the loop's clock jumps to the next timer instead."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Let the time pass that a loop would have slept."""
        self.now_s += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while it would sleep, so that times are exact."""

    def __init__(self) -> None:
        self._clock = VirtualSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Virtual seconds."""
        return self._clock.now_s

    def hold_up(self, lag_s: float) -> None:
        """Let time pass as if a callback had taken so long."""
        self._clock.now_s += lag_s


def virtually(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run to the end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work())


def request(name: str, ids: list[int], max_tokens: int) -> EngineRequest:
    """A request with plain parameters."""
    return EngineRequest(
        request_id=name, token_ids=ids, max_tokens=max_tokens, min_tokens=0, params=SamplingParams()
    )


async def turns(number: int) -> None:
    """Let the loop go round so often."""
    for _ in range(number):
        await asyncio.sleep(0)


async def collect(engine: EmulatedEngine, num_ends: int) -> dict[str, list[EngineOutput]]:
    """All outputs until so many requests have ended."""
    out: dict[str, list[EngineOutput]] = {}
    while num_ends:
        for output in await engine.outputs():
            out.setdefault(output.request_id, []).append(output)
            num_ends -= output.finish_reason is not None
    return out


@pytest.mark.parametrize("speed", [1.0, 0.25])
def test_steps_take_the_predicted_time_times_speed(speed: float) -> None:
    """Prompt of 200 in two chunks, then 9 decodes; a request that comes meanwhile waits for the next step."""

    async def work() -> None:
        engine, loop = EmulatedEngine(COST, speed=speed), asyncio.get_running_loop()
        await engine.start()
        await asyncio.sleep(3.0)
        await engine.add(request("a", [1] * 200, 10))
        tokens = [output.token_ids[0] for output in (await collect(engine, 1))["a"]]

        chunks_ms = 2 * 5.0 + 0.1 * 200 + 0.001 * (128 * 64 + 72 * (128 + 36))
        decodes_ms = sum(COST.step_ms(BatchShape(num_decodes=1, context_tokens=200 + k)) for k in range(1, 10))
        assert loop.time() == pytest.approx(3.0 + speed * (chunks_ms + decodes_ms) / 1000)
        assert tokens[:2] == [next_token([1] * 200), next_token([1] * 200 + tokens[:1])]
        records = engine.step_records()
        assert sum(record.elapsed_ms for record in records) == pytest.approx(chunks_ms + decodes_ms)
        assert [record.prefill_tokens for record in records] == [128, 72, *([0] * 9)]
        assert engine.step_records() == []
        await engine.stop()

    virtually(work)


@pytest.mark.parametrize(("lag_s", "late_s"), [(0.03, 0.0), (2.0, 1.95)])
def test_a_busy_loop_delays_the_tokens_and_not_the_end_unless_it_was_away(lag_s: float, late_s: float) -> None:
    """Steps that are a little late are followed by shorter waits; after a long absence nobody hurries."""

    async def work() -> None:
        engine, loop = EmulatedEngine(COST), asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        await engine.start()
        await engine.add(request("a", [1] * 100, 200))
        loop.call_at(0.5025, loop.hold_up, lag_s)
        await collect(engine, 1)

        prefill_ms = 5.0 + 0.1 * 100 + 0.001 * 100 * 50
        decodes_ms = sum(COST.step_ms(BatchShape(num_decodes=1, context_tokens=100 + k)) for k in range(1, 200))
        assert loop.time() - (prefill_ms + decodes_ms) / 1000 == pytest.approx(late_s, abs=0.01)
        await engine.stop()

    virtually(work)


async def test_what_can_never_be_computed_is_refused_alone() -> None:
    """Each refusal says why; the neighbour runs."""
    engine = EmulatedEngine(COST, speed=0, max_model_len=2000)
    info = await engine.start()
    assert (info.kv_capacity_tokens, info.max_running, info.max_model_len) == (1600, 6, 2000)
    await engine.add(request("fits", [1] * 1590, 10))
    await engine.add(request("cache", [1] * 1590, 11))
    await engine.add(request("model", [1] * 1991, 10))
    await engine.add(request("empty", [], 10))
    for name, value in (("logprobs", 1), ("structured_outputs", {"choice": ["a"]})):
        asked = replace(request(name, [1], 10), params=SamplingParams.model_validate({name: value}))
        await engine.add(asked)
    out = await collect(engine, 6)
    await engine.stop()

    fields = {name: outputs[-1].field for name, outputs in out.items()}
    assert fields == {
        "fits": "",
        "cache": "max_tokens",
        "model": "max_tokens",
        "empty": "prompt",
        "logprobs": "logprobs",
        "structured_outputs": "structured_outputs",
    }
    errors = {name: outputs[-1].error for name, outputs in out.items()}
    assert errors["fits"] is None
    assert "KV cache" in str(errors["cache"])
    assert "model" in str(errors["model"])
    assert "empty" in str(errors["empty"])
    for name in ("logprobs", "structured_outputs"):
        assert errors[name] == f"{name} need a model: the emulated engine has none"
    assert all(outputs[-1].finish_reason is FinishReason.ERROR for name, outputs in out.items() if name != "fits")
    assert len(out["fits"]) == 10


async def test_abort_takes_back_what_was_not_handed_out() -> None:
    """Even tokens that lie ready; the id may be used again at once."""
    engine = EmulatedEngine(COST, speed=0)
    await engine.start()
    await engine.add(request("a", [1], 500))
    await engine.add(request("b", [2], 5))
    await turns(40)
    assert engine.stats().num_steps > 10
    await engine.abort(["a", "unknown"])
    assert engine.stats().num_running == 0
    await engine.add(request("a", [3], 4))
    out = await collect(engine, 2)
    await engine.stop()

    assert len(out["b"]) == 5
    assert out["a"][0].token_ids == (next_token([3]),)
    assert len(out["a"]) == 4


@pytest.mark.parametrize("token_ids", [[], [1], [0, 255, 256, 65_536, 2**31 - 1] * 3])
def test_tokens_depend_on_the_ids_alone(token_ids: list[int]) -> None:
    """Not on how they are held: workers of two releases go on with each other's requests."""
    wide, packed = array("q", token_ids), id_array(pack_ids(token_ids))

    assert next_token(token_ids) == next_token(tuple(token_ids)) == next_token(wide) == next_token(packed)
    assert next_token([1, 2, 3]) == 6102


async def test_stats_follow_the_batch_and_steps_count_progress() -> None:
    """Seats and KV blocks taken; nothing left at the end; an idle engine makes no steps."""
    engine = EmulatedEngine(COST, speed=0)
    await engine.start()
    for index in range(8):
        await engine.add(request(str(index), [index] * 10, 30))
    await turns(5)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (6, 2)
    assert 60 <= stats.kv_used_tokens <= 6 * 48
    await collect(engine, 8)
    idle = engine.stats()
    await turns(10)
    assert engine.stats() == idle
    await engine.stop()

    assert (idle.num_running, idle.num_waiting, idle.kv_used_tokens) == (0, 0, 0)
    assert idle.num_steps > stats.num_steps


async def test_an_engine_that_has_stopped_says_so() -> None:
    """Whoever waits for outputs is told, and stopping twice is safe; so is stopping what never began."""
    engine = EmulatedEngine(COST, speed=0)
    await engine.stop()
    await engine.start()
    waiting = asyncio.create_task(engine.outputs())
    await asyncio.sleep(0)
    await engine.stop()
    await engine.stop()

    with pytest.raises(EngineDied):
        await waiting
    with pytest.raises(EngineDied):
        await engine.outputs()
