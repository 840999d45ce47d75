"""The emulated engine moves KV as the price of a move says."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from l4queue.cost.move import MovePrice
from l4queue.cost.step import BatchShape
from tests.unit.workers.engine.test_emulated_engine import COST, collect, request, turns, virtually
from workers.engine.emulated.engine import EmulatedEngine
from workers.engine.emulated.tickets import covered_tokens, make_ticket

BANDWIDTH = 1e6
BYTES = 1000
PRICE = MovePrice(bandwidth_bytes_per_s=BANDWIDTH, kv_bytes_per_token=BYTES, fixed_ms=0.0)


def engine(speed: float = 1.0, bandwidth: float = BANDWIDTH) -> EmulatedEngine:
    """One that can move KV."""
    return EmulatedEngine(COST, speed=speed, kv_bytes_per_s=bandwidth, kv_bytes_per_token=BYTES)


async def cut_after(source: EmulatedEngine, ids: list[int], num_tokens: int) -> tuple[list[int], str]:
    """Run a request for so many tokens; what came out, and its ticket."""
    await source.add(request("a", ids, 40))
    output: list[int] = []
    while len(output) < num_tokens:
        output += [token for out in await source.outputs() for token in out.token_ids]
    cut = await source.cut("a")
    assert cut is not None
    return output, cut.kv


@pytest.mark.parametrize("speed", [1.0, 0.25])
def test_a_move_takes_its_price_and_then_one_token_of_prefill(speed: float) -> None:
    """Not the prefill of the prompt; the tokens are those of the uncut run."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        source, target = engine(speed), engine(speed)
        assert (await source.start()).kv_bytes_per_token == BYTES
        await target.start()
        ids = list(range(100))
        await source.add(request("whole", ids, 40))
        whole = [t for out in (await collect(source, 1))["whole"] for t in out.token_ids]
        output, kv = await cut_after(source, ids, 8)
        num_tokens = 100 + len(output) - 1

        start_s = loop.time()
        await target.add(replace(request("a", ids + output, 40 - len(output)), kv=kv))
        assert target.stats().num_waiting == 1
        first = await target.outputs()
        # one chunk of one token on a context of all the others
        step = BatchShape(num_decodes=0, context_tokens=0, prefill_tokens=1, prefill_pairs=num_tokens + 0.5)
        expected_ms = PRICE.delay_ms(num_tokens, COST) + COST.step_ms(step)
        assert loop.time() - start_s == pytest.approx(expected_ms / 1000 * speed)
        rest = [t for out in first for t in out.token_ids]
        rest += [t for out in (await collect(target, 1))["a"] for t in out.token_ids]
        assert output + rest == whole
        stats = target.stats()
        assert (stats.num_kv_loads, stats.num_kv_misses) == (1, 0)
        assert stats.kv_loaded_bytes == num_tokens * BYTES
        await source.stop()
        await target.stop()

    virtually(work)


def test_a_ticket_that_does_not_fit_costs_the_prefill() -> None:
    """Of another request, another engine, or nonsense; without a bandwidth, any."""

    async def work() -> None:
        source, target, without = engine(), engine(), engine(bandwidth=0)
        for each in (source, target, without):
            await each.start()
        assert not (await without.start()).can_move_kv
        output, kv = await cut_after(source, list(range(50)), 3)
        tickets = [
            (target, kv, [*range(49), 7, *output]),
            (target, "0123456789abcdef01234567", [*range(50), *output]),
            (without, kv, [*range(50), *output]),
        ]
        for there, ticket, ids in tickets:
            there.step_records()
            await there.add(replace(request("b", ids, 2), kv=ticket))
            await collect(there, 1)
            assert there.step_records()[0].prefill_tokens == len(ids)
        assert (target.stats().num_kv_misses, target.stats().num_kv_loads) == (2, 0)
        assert without.stats().num_kv_misses == 1
        await without.add(request("c", [1, 2], 9))
        assert await without.cut("c") is not None
        for each in (source, target, without):
            await each.stop()

    virtually(work)


def test_what_is_on_its_way_can_be_aborted_and_cut_and_is_no_free_id() -> None:
    """Without KV then: it has none yet."""

    async def work() -> None:
        source, target = engine(), engine()
        await source.start()
        await target.start()
        output, kv = await cut_after(source, list(range(50)), 3)
        moved = replace(request("a", [*range(50), *output], 5), kv=kv)
        await target.add(moved)
        with pytest.raises(ValueError, match="in the engine already"):
            await target.add(moved)
        cut = await target.cut("a")
        assert cut is not None
        assert cut.kv == ""
        await target.add(moved)
        await target.abort(["a"])
        await turns(5)
        assert target.stats().num_waiting == 0
        assert await target.cut("a") is None
        await source.stop()
        await target.stop()

    virtually(work)


def test_a_ticket_covers_every_prefix_that_holds_its_prompt() -> None:
    """Never the last token."""
    ids = list(range(30))
    ticket = make_ticket(ids, num_tokens=40)
    assert covered_tokens(ticket, [*ids, *range(15)]) == 40
    assert covered_tokens(ticket, [*ids, 1, 2]) == 31
    assert covered_tokens(ticket, ids) == 29
    assert covered_tokens(ticket, ids[:-1]) == 0
    assert covered_tokens(ticket, [9, *ids[1:]]) == 0
    assert make_ticket(ids, num_tokens=0) == ""
    assert covered_tokens("", ids) == 0
