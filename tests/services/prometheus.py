"""A real Prometheus with the configuration and the rules of the project; only where it looks is changed."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from l4queue.cli.stack.embedded import free_port
from tests.services.processes import until

__all__ = (
    "MONITORING",
    "Prometheus",
    "draw_dashboard",
    "expressions",
    "has_data",
    "promtool",
    "tool",
    "without_comparison",
)

MONITORING = Path(__file__).resolve().parents[2] / "monitoring"
_WINDOW = "10s"
_INTERVAL = "1s"


def tool(name: str) -> str:
    """Path of `prometheus` or `promtool`. A laptop may lack them; CI may not."""
    found = shutil.which(name)
    if found is None:
        message = f"{name} is not on PATH (on Debian: apt-get install prometheus)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


def promtool(*arguments: str, text: str | None = None) -> None:
    """Run promtool, with text for its input; AssertionError with what it says when it finds fault."""
    command = [tool("promtool"), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip(), done.stderr


def without_comparison(expression: str) -> str:
    """An alert's expression that gives a value also while all is well: 0 or 1 instead of nothing."""
    shown = re.sub(r" (>|<|>=|<=|==) ", r" \1 bool ", expression)
    return re.sub(r"absent\(([^)]*)\)", r"\1", shown)


class Prometheus:
    """One server on a port of its own. Windows of rates are those of a test: 10 s, scraped every second."""

    def __init__(self, folder: Path, targets: Mapping[str, Sequence[int]]) -> None:
        self.folder = folder
        self.port = free_port()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)
        self._process: subprocess.Popen[bytes] | None = None
        config = copy.deepcopy(yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8")))
        config["global"] = {
            "scrape_interval": _INTERVAL,
            "scrape_timeout": _INTERVAL,
            "evaluation_interval": _INTERVAL,
        }
        config["rule_files"] = [str(MONITORING / pattern) for pattern in config["rule_files"]]
        for job in config["scrape_configs"]:
            del job["dns_sd_configs"]
            ports = targets[job["job_name"]]
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        self._config = folder / "prometheus.yml"
        self._config.write_text(yaml.safe_dump(config), encoding="utf-8")

    def start(self) -> None:
        """Start it; it is ready when it says so."""
        with (self.folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={self._config}",
                    f"--storage.tsdb.path={self.folder / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(self._is_ready, "Prometheus is ready", timeout_s=120)

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def targets(self) -> dict[str, str]:
        """Health of what is scraped, by URL."""
        found = self.http.get("/api/v1/targets").json()["data"]["activeTargets"]
        return {one["scrapeUrl"]: one["health"] for one in found}

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an instant query; Grafana's window is that of the test."""
        shown = expression.replace("$__rate_interval", _WINDOW)
        reply = self.http.get("/api/v1/query", params={"query": shown}).json()
        assert reply["status"] == "success", (shown, reply)
        return [(row["metric"], float(row["value"][1])) for row in reply["data"]["result"]]

    def value(self, expression: str) -> float | None:
        """The one value of a query; None when there is none."""
        found = self.query(expression)
        assert len(found) <= 1, (expression, found)
        return found[0][1] if found else None

    def rules(self) -> list[dict[str, Any]]:
        """Alerting rules with their state and health."""
        groups = self.http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def close(self) -> None:
        """End it."""
        self.http.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def expressions() -> list[tuple[str, str]]:
    """What the dashboard, the alerts and the examples of the manual ask, with where it stands."""
    (path,) = (MONITORING / "grafana" / "dashboards").glob("*.json")
    panels = json.loads(path.read_text("utf-8"))["panels"]
    found = [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]
    (group,) = yaml.safe_load((MONITORING / "rules" / "l4queue.yml").read_text("utf-8"))["groups"]
    found += [(rule["alert"], without_comparison(rule["expr"])) for rule in group["rules"]]
    manual = (MONITORING.parent / "docs" / "monitoring.md").read_text("utf-8")
    found += [("docs/monitoring.md", query) for query in re.findall(r"^ +query: (.+)$", manual, re.MULTILINE)]
    found += [
        ("docs/monitoring.md", q) for q in re.findall(r"^```promql\n(.+?)\n```$", manual, re.MULTILINE | re.S)
    ]
    return found


def draw_dashboard(prometheus: Prometheus, folder: Path) -> None:
    """Every panel is drawn with data in it; `L4_PICTURES=docs/img` keeps the picture, of a minute and a half."""
    file = Path(os.environ.get("L4_PICTURES", folder)).resolve() / "dashboard.png"
    if "L4_PICTURES" in os.environ:
        until(
            lambda: (prometheus.value("min(count_over_time(up[10m]))") or 0) > 90,
            "so much is there",
            timeout_s=180,
        )
    script = MONITORING.parent / "tools" / "dashboard_picture.py"
    url = f"http://127.0.0.1:{prometheus.port}"
    options = ("--prometheus", url, "--minutes", "3", "--window", "10s", "--out", str(file))
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{file} written\n"
    assert file.read_bytes().startswith(b"\x89PNG")


def has_data(prometheus: Prometheus, expression: str) -> bool:
    """At least one value that is a number."""
    return any(not math.isnan(value) for _, value in prometheus.query(expression))
