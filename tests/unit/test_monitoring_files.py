"""The files of monitoring/ agree with each other, with docker-compose.yml and with the code that writes them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "monitoring"
PROVISIONING = MONITORING / "grafana" / "provisioning"


@pytest.fixture(scope="module")
def panels() -> list[dict[str, Any]]:
    """Panels of the dashboard."""
    (path,) = (MONITORING / "grafana" / "dashboards").glob("*.json")
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["panels"]
    return found


def test_the_dashboard_is_what_its_table_says() -> None:
    """Otherwise: make docs."""
    command = [sys.executable, str(ROOT / "tools" / "generate_dashboard.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ids_and_titles_are_unique(panels: list[dict[str, Any]]) -> None:
    """Grafana links to panels by id, people by title."""
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_panels_fill_the_grid_without_overlaps(panels: list[dict[str, Any]]) -> None:
    """24 columns; no cell twice; no row of the grid empty."""
    cells = set()
    for panel in panels:
        at = panel["gridPos"]
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert cell[0] < 24, panel["title"]
            assert cell not in cells, panel["title"]
            cells.add(cell)
    rows = {y for _, y in cells}
    assert rows == set(range(max(rows) + 1))


def test_every_query_goes_to_the_datasource_that_is_provisioned(panels: list[dict[str, Any]]) -> None:
    """By its uid; and refs are unique within a panel."""
    provisioned = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text("utf-8"))
    (source,) = provisioned["datasources"]
    wanted = {"type": source["type"], "uid": source["uid"]}
    for panel in panels:
        targets = panel.get("targets", ())
        assert len({target["refId"] for target in targets}) == len(targets), panel["title"]
        assert all(target["datasource"] == wanted and target["expr"] for target in targets), panel["title"]
        assert panel["type"] == "row" or targets, panel["title"]


def services() -> dict[str, Any]:
    """Of docker-compose.yml."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    return found


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Host directory and path in the container."""
    for volume in service["volumes"]:
        source, target, *_ = volume.split(":")
        if source.startswith("./"):
            yield source, target


def test_the_containers_find_their_files() -> None:
    """Prometheus its configuration and rules, Grafana the directory that provisioning names."""
    (prometheus,) = mounts(services()["prometheus"])
    assert prometheus == ("./monitoring", "/etc/prometheus")
    assert "--config.file=/etc/prometheus/prometheus.yml" in services()["prometheus"]["command"]
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
    assert all(list(MONITORING.glob(pattern)) for pattern in config["rule_files"])
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "l4queue.yml").read_text("utf-8"))["providers"]
    assert ("./monitoring/grafana/dashboards", provider["options"]["path"]) in list(mounts(services()["grafana"]))


def test_prometheus_scrapes_services_that_there_are_at_the_port_they_have() -> None:
    """Names and port of the compose file."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
    found = services()
    for job in config["scrape_configs"]:
        (discovery,) = job["dns_sd_configs"]
        for name in discovery["names"]:
            environment = found[name]["environment"]
            assert environment["L4_METRICS_PORT"] == str(discovery["port"])
            assert environment["L4_METRICS_HOST"] == "0.0.0.0"
