"""The table of `l4queue simulate`: a column for each policy, a row for each figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l4queue.sim.results import SimResult

__all__ = ("ROWS", "cells_of", "print_table")

ROWS: tuple[tuple[str, str], ...] = (
    ("mean_e2e_s", "mean e2e"),
    ("p50_e2e_s", "p50 e2e"),
    ("p95_e2e_s", "p95 e2e"),
    ("p99_e2e_s", "p99 e2e"),
    ("mean_ttft_s", "mean TTFT"),
    ("p50_ttft_s", "p50 TTFT"),
    ("p99_ttft_s", "p99 TTFT"),
    ("mean_tpot_s", "mean TPOT"),
    ("p99_tpot_s", "p99 TPOT"),
)


def cells_of(result: SimResult) -> list[str]:
    """The figures of a policy, as shown."""
    cells = [_seconds(getattr(result, key)) for key, _ in ROWS]
    cells += [_seconds(result.short.mean_e2e_s), _seconds(result.long.mean_e2e_s), f"{result.throughput_rps:.2f}"]
    cells += [str(n) for n in (result.num_handovers, result.num_steals, result.num_preemptions)]
    return cells if result.cached_share is None else [*cells, f"{result.cached_share:.1%}"]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def print_table(title: str, columns: dict[str, list[str]], *, first: str | None = None) -> None:
    """A column for each policy, a row for each figure: readable with 80 characters a line."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    print(title)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    names = [label for _, label in ROWS]
    names += ["mean e2e, short 95 %", "mean e2e, long 5 %", "requests/s", "hand-overs", "steals", "preemptions"]
    if first is not None:
        names.insert(0, first)
    if any(len(cells) > len(names) for cells in columns.values()):
        names.append("prompt tokens cached")
    padded = [cells + ["-"] * (len(names) - len(cells)) for cells in columns.values()]
    for label, *cells in zip(names, *padded, strict=True):
        table.add_row(label, *cells)
    Console().print(table)
