"""Writes the Grafana dashboard from the table of its panels; `--check` fails when the file is out of date."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dashboard_panels import ROWS, Panel

DASHBOARD = Path(__file__).resolve().parent.parent / "monitoring" / "grafana" / "dashboards" / "l4queue.json"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH = 24


def panels() -> Iterator[dict[str, Any]]:
    """Rows and panels from left to right, from top to bottom."""
    y = number = 0
    for name, row in ROWS:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": name,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        }
        y, x, height = y + 1, 0, 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            number += 1
            yield drawn(panel, number=number, x=x, y=y)
            x, height = x + panel.width, panel.height
        y += height


def drawn(panel: Panel, *, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana wants it."""
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": legend or panel.title,
            "format": "heatmap" if panel.kind == "heatmap" else "time_series",
        }
        for index, (expression, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": targets,
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _field(panel: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.is_stacked else 0,
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 2} if panel.is_log else {"type": "linear"},
        }
    # a logarithmic axis has no zero
    least = {} if panel.is_log else {"min": 0}
    return {"unit": panel.unit, **least, "custom": custom}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": "short"}, "color": {"scheme": "Blues", "mode": "scheme"}}
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "none"}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}


def dashboard() -> str:
    """The whole file."""
    content = {
        "uid": "l4queue",
        "title": "l4queue",
        "tags": ["l4queue"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "templating": {"list": []},
        "annotations": {"list": []},
        "panels": list(panels()),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write the file, or compare it."""
    if "--check" not in arguments:
        DASHBOARD.write_text(dashboard(), encoding="utf-8")
        return 0
    if DASHBOARD.exists() and DASHBOARD.read_text(encoding="utf-8") == dashboard():
        print(f"{DASHBOARD.name} is up to date")
        return 0
    print(f"{DASHBOARD.name} is out of date; run: make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
