"""Tables of `l4queue stats`: room and speed of KV caches on their way, where any worker moves them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from l4queue.cli.stats import tables
from l4queue.cost.move import MovePrice
from l4queue.models import Plan
from l4queue.observe.overview import Overview, price_in_force

FAST = MovePrice(bandwidth_bytes_per_s=3e9, room_bytes=3 << 30)
SLOW = MovePrice(bandwidth_bytes_per_s=1e9, room_bytes=192 << 20)


def overview_of(*prices: MovePrice) -> Overview:
    """A fleet whose workers tell these prices."""
    return Overview(
        now_ms=0, plan=Plan.one_stage(), workers=(), costs=(), prices=prices, queues={}, inbox=0, counts={}
    )


@pytest.mark.parametrize(
    ("prices", "row"),
    [
        ((FAST,), ["3.00", "3.0 GiB", "24576"]),
        ((FAST, SLOW, FAST), ["3.00", "192 MiB", "1536"]),
        ((MovePrice(bandwidth_bytes_per_s=50e9),), ["50.00", "no bound", "no bound"]),
        ((FAST, MovePrice()), None),
        ((), None),
    ],
)
def test_the_median_speed_and_the_least_room_hold_for_all(
    prices: tuple[MovePrice, ...], row: list[str] | None
) -> None:
    """Prefilling again where one worker cannot move KV caches; then there is no table."""
    shown = io.StringIO()
    for table in tables(overview_of(*prices)):
        Console(file=shown, width=100).print(table)
    text = shown.getvalue()

    assert ("KV caches on their way" in text) == (row is not None)
    if row is not None:
        (line,) = [line for line in text.splitlines() if row[0] in line]
        assert [cell.strip() for cell in line.strip("│").split("│")] == row
        assert price_in_force(overview_of(*prices)).bandwidth_bytes_per_s == float(row[0]) * 1e9
