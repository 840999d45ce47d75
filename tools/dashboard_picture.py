"""The dashboard's panels with data, where no Grafana is at hand: `python tools/dashboard_picture.py --out FILE`.

Reads monitoring/grafana/dashboards/l4queue.json and runs each panel's query on a running Prometheus, over the last
`--minutes`. Draws the panels where Grafana would: same queries, legends, units and places, not its looks.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from l4queue.sim.plots import require_matplotlib

__all__ = ("Ask", "ask_prometheus", "draw")

DASHBOARD = Path(__file__).resolve().parent.parent / "monitoring" / "grafana" / "dashboards" / "l4queue.json"
Series = list[tuple[str, np.ndarray, np.ndarray]]
Ask = Callable[[str], list[dict[str, Any]]]
"""An expression to the rows of Prometheus' range query: `metric` (labels) and `values` ([unix time s, text])."""

_COLUMN, _ROW = 0.6, 0.25  # size of a cell of Grafana's grid, inches
_SCALES = {"percentunit": (100.0, " %"), "bytes": (2.0**-20, " MiB"), "s": (1.0, " s"), "reqps": (1.0, "/s")}
_PALE = "#666666"


def ask_prometheus(url: str, *, seconds: float, window: str, points: int = 240) -> Ask:
    """Asks the server at `url` for the last `seconds`; `window` stands for Grafana's `$__rate_interval`."""
    end_s = time.time()
    span = {"start": end_s - seconds, "end": end_s, "step": max(1.0, seconds / points)}

    def ask(expression: str) -> list[dict[str, Any]]:
        shown = expression.replace("$__rate_interval", window)
        reply = httpx.get(f"{url}/api/v1/query_range", params={"query": shown, **span}, timeout=30).json()
        if reply["status"] != "success":
            raise SystemExit(f"Prometheus refuses {shown!r}: {reply.get('error')}")
        rows: list[dict[str, Any]] = reply["data"]["result"]
        return rows

    return ask


def draw(ask: Ask, out: Path) -> dict[str, int]:
    """Write the picture; how many series of numbers each panel shows."""
    plt = require_matplotlib()
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = plt.figure(figsize=(24 * _COLUMN, height * _ROW))
    found = {panel["id"]: _found(ask, panel) for panel in panels}
    times = [at_s for series in found.values() for _, at_s, _ in series]
    span_s = (min(at_s[0] for at_s in times), max(at_s[-1] for at_s in times)) if times else (0.0, 1.0)
    shown = {}
    for panel in panels:
        place = panel["gridPos"]
        if panel["type"] == "row":
            figure.text(0.01, 1.0 - (place["y"] + 0.6) / height, panel["title"], fontsize=9, weight="bold")
            continue
        axis = figure.add_axes(
            (
                (place["x"] + 0.9) / 24,
                1.0 - (place["y"] + place["h"] - 1.4) / height,
                (place["w"] - 1.1) / 24,
                (place["h"] - 2.6) / height,
            )
        )
        kind = {"stat": _stat, "heatmap": _heatmap}.get(panel["type"], _lines)
        kind(axis, panel, [(name, at_s - span_s[1], values) for name, at_s, values in found[panel["id"]]])
        axis.set_xlim(span_s[0] - span_s[1], 0)
        axis.set_title(panel["title"], fontsize=7, loc="left", pad=3)
        shown[panel["title"]] = len(found[panel["id"]])
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return shown


def _found(ask: Ask, panel: Mapping[str, Any]) -> Series:
    return [series for target in panel.get("targets", ()) for series in _series(ask(target["expr"]), target)]


def _series(rows: list[dict[str, Any]], target: Mapping[str, Any]) -> Series:
    found = []
    for row in rows:
        values = np.array([[float(at_s), float(value)] for at_s, value in row["values"]])
        values = values[np.isfinite(values[:, 1])]
        if len(values):
            name = re.sub(r"\{\{(\w+)\}\}", lambda m, row=row: row["metric"].get(m[1], ""), target["legendFormat"])
            found.append((name, values[:, 0], values[:, 1]))
    return found


def _unit(panel: Mapping[str, Any]) -> tuple[float, str]:
    return _SCALES.get(panel["fieldConfig"]["defaults"]["unit"], (1.0, ""))


def _stat(axis: Any, panel: Mapping[str, Any], found: Series) -> None:
    """The last value, large."""
    scale, unit = _unit(panel)
    text = f"{found[0][2][-1] * scale:,.4g}{unit}" if found else "No data"
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=15, transform=axis.transAxes)
    axis.set_axis_off()


def _lines(axis: Any, panel: Mapping[str, Any], found: Series) -> None:
    scale, unit = _unit(panel)
    custom = panel["fieldConfig"]["defaults"]["custom"]
    is_stacked = custom["stacking"]["mode"] == "normal"
    if is_stacked and found:
        times = np.unique(np.concatenate([at_s for _, at_s, _ in found]))
        rows = [np.interp(times, at_s, values * scale, left=0.0, right=0.0) for _, at_s, values in found]
        axis.stackplot(times, rows, labels=[name for name, _, _ in found], alpha=0.6)
    for name, at_s, values in () if is_stacked else found:
        axis.plot(at_s, values * scale, linewidth=1, label=name)
    if custom["scaleDistribution"]["type"] == "log":
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    elif found:
        axis.set_ylim(bottom=0)
    if found and len(found) <= 12:
        axis.legend(fontsize=5, loc="upper left", ncols=2, framealpha=0.6)
    _plain(axis, unit)


def _heatmap(axis: Any, panel: Mapping[str, Any], found: Series) -> None:
    """Buckets over time, each with its own count instead of the cumulated one."""
    bounds = sorted(found, key=lambda series: math.inf if series[0] == "+Inf" else float(series[0]))
    if bounds:
        times = bounds[0][1]
        rows = np.array([np.interp(times, at_s, values) for _, at_s, values in bounds])
        counts = np.diff(rows, axis=0, prepend=0.0).clip(min=0.0)
        axis.imshow(
            counts, aspect="auto", origin="lower", cmap="Blues", extent=(times[0], times[-1], 0, len(rows))
        )
        axis.set_yticks(np.arange(len(rows)) + 0.5, [name for name, _, _ in bounds])
    _plain(axis, "")


def _plain(axis: Any, unit: str) -> None:
    axis.tick_params(labelsize=6, colors=_PALE)
    axis.set_ylabel(unit.strip(), fontsize=6, color=_PALE)
    axis.grid(alpha=0.25)
    for side in axis.spines.values():
        side.set_color("#bbbbbb")


def main() -> None:
    """Draw what a Prometheus has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="where it listens")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--window", default="1m", help="of rates: four scrapes or more")
    parser.add_argument("--out", type=Path, required=True, help="a PNG file")
    given = parser.parse_args()
    ask = ask_prometheus(given.prometheus, seconds=given.minutes * 60, window=given.window)
    empty = [title for title, number in draw(ask, given.out).items() if not number]
    print(f"{given.out} written" + (f"; without data: {', '.join(empty)}" if empty else ""))


if __name__ == "__main__":
    main()
