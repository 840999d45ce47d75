"""Layout of `stats --watch`: rich renderables fitted to the width and height of the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from l4queue.cli.watch.window import LATENCY_S, Latency, Picture, StageView, Waiting
from l4queue.models import Plan, StagePlan, WorkerLoad
from l4queue.protocol.ledger import LedgerEvent, MoveCounter

if TYPE_CHECKING:
    from l4queue.observe.watch import RecentMove

__all__ = ("WIDE_COLUMNS", "fit", "number", "time_text")

WIDE_COLUMNS = 104
"""From this width on workers show what does not fit into 80 columns."""
_ENGINE_COLUMNS = 136  # terminal columns from which the engine's column fits
_AIRY_ROWS = 28  # terminal rows from which blank lines separate the tables
_BAR, _SHORT_BAR = 12, 8  # characters; both tables then fit 80 columns
_BUSY, _FULL = 0.7, 0.9  # shares from which a bar is yellow and red
_MAX_MOVES = 10  # rows
_ALARM = "bold white on red"
_KINDS = {
    LedgerEvent.HANDOVER: "hand-over",
    LedgerEvent.ESCAPE: "escape",
    LedgerEvent.STEAL: "stolen running",
    LedgerEvent.STOLEN: "stolen waiting",
}
_MOVED = {
    MoveCounter.HANDOVERS: "hand-overs",
    MoveCounter.STEALS_WAITING: "stolen waiting",
    MoveCounter.STEALS_RUNNING: "running",
}
_BAD_ENDS = ("failed", "expired", "dead")


def fit(picture: Picture, console: Console, *, title: str, trouble: str = "") -> RenderableType:
    """The whole view for this console. `trouble` stands at its top, with a note that the rest is old.

    Where the height is short, blank lines, workers and moves give way; how many workers are left out is told.
    """
    gap: list[RenderableType] = [Text("")] if console.height >= _AIRY_ROWS else []
    top = [_head(picture, title, trouble), *gap, _stages(picture), *gap, _latencies(picture), *gap]
    used = sum(len(console.render_lines(part)) for part in top)
    room = console.height - used - len(gap) - 3  # a heading, the line of moves, and one that stays free
    num_moves = min(len(picture.moves), _MAX_MOVES, max(1, room - picture.num_workers, room // 4))
    workers = _workers(picture, max(2, room - num_moves), columns=console.width)
    return Group(*top, workers, *gap, _moves(picture, num_moves, is_wide=console.width >= WIDE_COLUMNS))


def number(value: float) -> str:
    """A count in at most 5 characters or so: 812, 3.4k, 51k, 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if scaled < 9.95 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}"


def time_text(ms: float | None) -> str:
    """A duration: 0.4 ms, 85 ms, 1.2 s, 34 s, 12 min, 3.4 h."""
    if ms is None:
        return "–"
    for size, unit, limit in ((1, "ms", 999.5), (1e3, "s", 99_500), (6e4, "min", 5_970_000)):
        if ms < limit:
            value = ms / size
            return f"{value:.0f} {unit}" if value >= 9.95 or value == int(value) else f"{value:.1f} {unit}"
    return f"{ms / 3.6e6:.1f} h"


def _head(picture: Picture, title: str, trouble: str) -> RenderableType:
    plan = picture.plan
    clock = f"{datetime.fromtimestamp(picture.at_ms / 1000).astimezone():%H:%M:%S}"
    first = Table.grid(expand=True)
    first.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    first.add_column(justify="right", no_wrap=True)
    told = Text(f"as of {clock}", style=_ALARM) if trouble else Text(clock, style="bold")
    first.add_row(Text(title, style="bold"), told)
    age = f", {time_text(picture.at_ms - plan.created_ms)} old" if plan.created_ms else ""
    about = _line(f"plan {plan.version}{age}: {plan.reason or _num_stages(plan)}", style="dim")
    if trouble:
        return Group(first, _line(trouble, style=_ALARM), about, _flow(picture))
    return Group(first, about, _flow(picture))


def _num_stages(plan: Plan) -> str:
    return "one stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages"


def _flow(picture: Picture) -> Text:
    """Rates and totals in one line; bad ends only where there are any."""
    rates, counts, line = picture.rates, picture.counts, _line("")
    figures = [
        ("in", f"{_rate(rates.accepted_per_s)}/s", ""),
        ("done", f"{_rate(rates.done_per_s)}/s", ""),
        ("out", f"{_rate(rates.output_tokens_per_s)} tok/s", ""),
        ("live", f"{counts.get('live', 0):,}", ""),
        ("in all", f"{counts.get('done', 0):,}", ""),
    ]
    figures += [(name, number(counts[name]), "bold red") for name in _BAD_ENDS if counts.get(name, 0)]
    if counts.get("cancelled", 0):
        figures.append(("cancelled", number(counts["cancelled"]), ""))
    for name, figure, style in figures:
        line.append(f"{name} ", style="cyan").append(f"{figure}  ", style=style)
    return line


def _rate(per_s: float | None) -> str:
    return "–" if per_s is None else number(per_s)


def _stages(picture: Picture) -> RenderableType:
    table = _table("stage", "range", "workers", ">running / slots", ">KV", ">waiting", ">tokens", ">oldest")
    for view in picture.stages:
        load = view.num_running / view.num_slots if view.num_slots else 0.0
        table.add_row(
            str(view.index),
            _range(view.stage),
            str(len(view.workers)) if view.workers else Text("none", style="bold red"),
            _bar(load, f"{number(view.num_running)}/{number(view.num_slots)}", width=_BAR, label_width=7),
            _percent(view.kv_share),
            *_waiting(view.waiting),
        )
    for name, waiting in (("inbox", picture.inbox), ("solo", picture.solo)):
        if waiting.num_requests:
            what = "not yet routed" if name == "inbox" else "died with two workers"
            table.add_row(name, "", "", Text(what, style="dim"), "", *_waiting(waiting))
    return table


def _waiting(waiting: Waiting) -> tuple[str, str, str]:
    tokens = number(waiting.tokens) if waiting.tokens and waiting.num_requests else "–"
    return number(waiting.num_requests), tokens, time_text(waiting.oldest_ms)


def _latencies(picture: Picture) -> RenderableType:
    table = _table(
        f"last {LATENCY_S:.0f} s", ">done", ">TTFT p50", ">p99", ">TPOT p50", ">p99", ">E2E p50", ">p99"
    )
    for latency in picture.latencies:
        name = "all" if latency.stage is None else f"prompt {_range(picture.plan.stages[latency.stage])}"
        pairs = (latency.ttft_ms, latency.tpot_ms, latency.e2e_ms)
        cells = [time_text(ms) for pair in pairs for ms in (pair or (None, None))]
        table.add_row(name, _count(latency), *cells)
    return table


def _count(latency: Latency) -> str:
    return f"{latency.num_requests:,}" if latency.num_requests < 10_000 else number(latency.num_requests)


def _workers(picture: Picture, room: int, *, columns: int) -> RenderableType:
    """Workers by stage and name, as many as there is room for."""
    heads = ["worker", "stage", ">running / slots", ">KV", ">context", ">step", ">done"]
    heads += [">in engine", ">preempted"] if columns >= WIDE_COLUMNS else []
    heads += ["engine"] if columns >= _ENGINE_COLUMNS else []
    table = _table(*heads)
    rows = [(view, load) for view in picture.stages for load in sorted(view.workers, key=lambda w: w.worker_id)]
    shown = len(rows) if len(rows) <= room else max(1, room - 1)
    for view, load in rows[:shown]:
        table.add_row(*_worker(view, load)[: len(heads)])
    if not rows:
        table.add_row(Text("no worker serves", style="bold red"))
    if len(rows) > shown:
        rest = [load for _, load in rows[shown:]]
        running, slots = sum(w.num_running for w in rest), sum(w.max_running for w in rest)
        bar = _bar(running / slots if slots else 0.0, f"{running}/{slots}", width=_SHORT_BAR, label_width=7)
        table.add_row(Text(f"… {len(rest)} more", style="dim"), "", bar)
    return table


def _worker(view: StageView, load: WorkerLoad) -> list[RenderableType]:
    share = load.num_running / load.max_running if load.max_running else 0.0
    name = _clipped(load.worker_id, 16)
    return [
        Text(f"{_clipped(name, 9)} drains", style="yellow") if load.is_draining else name,
        str(view.index),
        _bar(share, f"{load.num_running}/{load.max_running}", width=_SHORT_BAR, label_width=7),
        _bar(load.kv_share, f"{load.kv_share:.0%}", width=_SHORT_BAR, label_width=4),
        number(load.context_tokens),
        time_text(load.step_ms),
        number(load.num_finished),
        str(load.num_waiting_in_engine),
        str(load.num_preemptions),
        load.engine,
    ]


def _moves(picture: Picture, count: int, *, is_wide: bool) -> RenderableType:
    line = _line("").append(f"moved, {LATENCY_S:.0f} s / in all  ", style="cyan")
    for name, label in _MOVED.items():
        line.append(f"{label} {picture.moved[name]}/{number(picture.counts.get(name, 0))}  ")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    for move in picture.moves[:count]:
        table.add_row(*_move(move, picture.at_ms, is_wide=is_wide))
    return Group(line, table) if count else line


def _move(move: RecentMove, now_ms: int, *, is_wide: bool) -> Sequence[str]:
    age_ms = now_ms - move.at_ms
    ago = f"{time_text(age_ms - age_ms % 1000)} ago" if age_ms >= 1000 else "now"
    way = f"{_clipped(move.source, 14)} → {_clipped(move.target, 14)}"
    price = f"gains {time_text(move.benefit_ms)}, costs {time_text(move.cost_ms)}"
    return ago, _KINDS[move.kind], way, price, *((move.request_id,) if is_wide else ())


def _table(*names: str) -> Table:
    """Headings only, no lines. A name that begins with `>` is a column of figures."""
    table = Table(box=None, header_style="cyan", pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    for name in names:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def _line(text: str, *, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _clipped(name: str, columns: int) -> str:
    """A name with its middle left out where it is too long: both its ends tell it from others."""
    keep = columns // 2
    return name if len(name) <= columns else f"{name[: columns - keep - 1]}…{name[-keep:]}"


def _range(stage: StagePlan) -> str:
    return f"{_edge(stage.low_tokens)}–{'∞' if stage.high_tokens is None else _edge(stage.high_tokens)}"


def _edge(tokens: int) -> str:
    return str(tokens) if tokens < 10_000 else number(tokens)


def _bar(share: float, label: str, *, width: int, label_width: int) -> Text:
    filled = min(width, max(0, round(share * width)))
    if share > 0:
        filled = max(1, filled)
    bar = Text("━" * filled, style=_style(share)).append("─" * (width - filled), style="bright_black")
    return bar.append(f" {label:>{label_width}}", style="default")


def _percent(share: float) -> Text:
    return Text(f"{share:.0%}", style=_style(share) if share >= _BUSY else "")


def _style(share: float) -> str:
    return "red" if share >= _FULL else "yellow" if share >= _BUSY else "green"
